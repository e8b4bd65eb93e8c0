/* random.c - the choices of the emulator: one seeded sequence, and the options of the environment.
 *
 * MOE_EMULATION_SEED=n repeats a run. Without it the seed is 1, so that a test gives the same
 * answer twice; a test that wants others sets them. */
#include "internal.h"

#include <stdlib.h>

static uint64_t seed, state;
static bool seeded;

const char *emu_option(const char *name)
{
    const char *value = getenv(name);
    return value != NULL && value[0] != 0 ? value : NULL;
}

void emu_set_seed(uint64_t value)
{
    seed = value;
    state = value * 0x9e3779b97f4a7c15u + 0x632be59bd9b4e019u;
    seeded = true;
}

uint64_t emu_seed(void)
{
    const char *option = seeded ? NULL : emu_option("MOE_EMULATION_SEED");
    if (!seeded) emu_set_seed(option != NULL ? strtoull(option, NULL, 0) : 1);
    return seed;
}

/* splitmix64 */
uint32_t emu_random(uint32_t below)
{
    if (!seeded) emu_seed();
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((((z ^ (z >> 31)) >> 32) * below) >> 32);
}

bool emu_coin(uint32_t one_in) { return emu_random(one_in) == 0; }

bool emu_eager(void)
{
    static int eager = -1;
    if (eager < 0) eager = emu_option("MOE_EMULATION_EAGER") != NULL;
    return eager;
}
