/* classes.h - kinds of bytes, for the picture of what experts have learned. */
#ifndef DEMO_CLASSES_H
#define DEMO_CLASSES_H

#include <stdint.h>

enum { CLASSES = 10 };

/* Returns 0 <= class < CLASSES. */
int class_of_byte(uint8_t byte);
/* Returns at most 6 characters, static. */
const char *class_name(int which);

#endif
