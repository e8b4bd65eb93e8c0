/* moe/preset.h - conventions by name, and a configuration in words.
 *
 * A preset sets the conventions of a paper or a system: kinds, scores, losses, capacity, K, groups,
 * activation, layout of the arithmetic. It never sets a size (d_model, d_hidden, d_out,
 * num_experts), a dtype, a layout, a seed, a number of a stream or where parameters live: these
 * stay as they are. The meaning of a name is frozen. docs/numerics.md has the table with
 * sources. */
#ifndef MOE_PRESET_H
#define MOE_PRESET_H

#include <moe/experts.h>
#include <moe/gate.h>
#include <moe/layer.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* Sets the conventions of `name` in three configs.
 *   name     one of moe_preset_name
 *   gate     in, out: a config after its init; NULL: left out
 *   experts  likewise
 *   layer    likewise. A preset whose model has shared experts or a residual branch sets how they
 *            are combined; the pools are the host's to make
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT with the name that is not known, or an error of a
 * struct's size; on error nothing is written. Any thread. Since 0.1. */
MOE_API moe_status moe_preset(const char *name, moe_gate_config *gate, moe_experts_config *experts,
                              moe_layer_config *layer);

/* Returns the number of presets. Since 0.1. */
MOE_API int64_t moe_preset_count(void);

/* Returns the name of a preset, or NULL unless 0 <= index < moe_preset_count(). Lives for good.
 * Since 0.1. */
MOE_API const char *moe_preset_name(int64_t index);

/* Returns the source of a preset: paper and equations, or system and file; NULL as above. Since
 * 0.1. */
MOE_API const char *moe_preset_source(int64_t index);

/* Prints configurations in words, with their formulas: UTF-8 text of several lines, the same for
 * the same configs.
 *   text      out: `capacity` bytes, ended by a 0 byte; may be NULL if capacity is 0
 *   capacity  bytes
 *   size      out: bytes needed, the 0 included; always written if the arguments are good
 *   gate, experts, layer  in: what to describe; any may be NULL, not all
 * Configs are checked as by create: one that would be refused is refused here with the same code
 * and message, but for what a layer asks of its objects: which it has is all that is looked at.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED,
 * MOE_ERROR_BUFFER_TOO_SMALL with nothing written to text, or an error of a struct's size. Any
 * thread. Since 0.1. */
MOE_API moe_status moe_describe(char *text, int64_t capacity, int64_t *size,
                                const moe_gate_config *gate, const moe_experts_config *experts,
                                const moe_layer_config *layer);

MOE_END_DECLS

#endif
