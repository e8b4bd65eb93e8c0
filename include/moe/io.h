/* moe/io.h - files: safetensors, checkpoints of layers, weights of published models.
 *
 * In the library libmoe_io (pkg-config moe-io), which needs jansson; not part of moe.h.
 *
 *     a file        moe_file_open, moe_file_find, moe_file_read
 *     a checkpoint  moe_checkpoint_save, moe_checkpoint_load: one file, the same bytes for any
 *                   number of ranks, so that what P ranks wrote Q ranks read
 *     a model       moe_import: the tensors of a family's naming into a layer's parameters;
 *                   moe_export: the reverse
 *     a dense net   moe_upcycle: one feed-forward network into every expert
 *
 * A file is hostile until proved otherwise: every number in it is checked before it is used, and a
 * call that refuses one has written nothing. docs/checkpoints.md has formats, names and examples.
 *
 * Ranks: calls on layers with a communicator of several ranks are made by all of its ranks at once,
 * with the same arguments but for the layers' own shards; every rank gets the same verdict, with
 * the message of the first rank that failed. Not while another thread is in a call on the layer.
 *
 * Memory for tables comes from malloc. Codes shared by all calls: MOE_ERROR_INVALID_ARGUMENT,
 * MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_OVERFLOW, MOE_ERROR_SYSTEM (the operating system refused an
 * operation on a file; the message has its reason), MOE_ERROR_NOT_SUPPORTED (also if libmoe is of
 * another version), an error of a struct's size, and on several ranks MOE_ERROR_TIMEOUT and
 * MOE_ERROR_TRANSPORT. */
#ifndef MOE_IO_H
#define MOE_IO_H

#include <moe/comm.h>
#include <moe/context.h>
#include <moe/layer.h>
#include <moe/parameter.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* ---- safetensors ----------------------------------------------------------------------------- */

/* An open file, or the files of a sharded checkpoint. */
typedef struct moe_file moe_file;

/* Element types of files beyond MOE_DTYPE_*: they can be read as they are. */
enum {
    MOE_FILE_BOOL = 32,
    MOE_FILE_U8 = 33,
    MOE_FILE_I8 = 34,
    MOE_FILE_U16 = 35,
    MOE_FILE_I16 = 36,
    MOE_FILE_U32 = 37,
    MOE_FILE_U64 = 38,
    MOE_FILE_F8_E4M3 = 39,
    MOE_FILE_F8_E5M2 = 40,
    MOE_FILE_F8_E8M0 = 41,
    MOE_FILE_C64 = 42
};

enum {
    MOE_FILE_MAX_DIMS = 8, /* most dimensions of a tensor in a file */
    MOE_FILE_ALL = -1      /* count: to the end of the first dimension */
};

/* One tensor of a file. Filled by moe_file_entry. */
typedef struct moe_file_record {
    uint64_t struct_size;
    const char *name;                 /* lives until the file is closed; no control characters */
    const char *path;                 /* of the file it is in; likewise */
    int64_t shape[MOE_FILE_MAX_DIMS]; /* dims beyond `dims` are 1 */
    int64_t element_count;            /* product of shape; 1 for a scalar (dims 0) */
    int64_t bytes;
    int64_t offset; /* of its first byte in the file at `path` */
    int32_t dims;   /* 0 to MOE_FILE_MAX_DIMS */
    int32_t dtype;  /* MOE_DTYPE_* or MOE_FILE_* */
} moe_file_record;

/* Writes every default (0) and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_file_record_init(moe_file_record *record, size_t size);

/* Opens a .safetensors file, a sharded checkpoint by its .index.json, or a directory that has one
 * of the two: model.safetensors.index.json, else model.safetensors, else its only *.safetensors.
 *   file  out: the new handle; untouched on error
 *   path  copied
 * Headers are read and checked whole, data is not touched. Returns MOE_OK, the codes above or
 *   MOE_ERROR_CORRUPT_DATA   a broken header; overlapping tensors or holes; a name twice; an
 *                            index that names a file outside its directory, or one that has not
 *                            the tensor, or an unknown dtype; with the offending name and values
 * Since 0.1. */
MOE_API moe_status moe_file_open(moe_file **file, const char *path);

/* Closes a file. NULL is legal. Since 0.1. */
MOE_API void moe_file_close(moe_file *file);

/* The number of tensors; 0 for NULL. They are in order of name. Since 0.1. */
MOE_API int64_t moe_file_count(const moe_file *file);

/* The index of a tensor by its name, or -1 if there is none or an argument is NULL. Since 0.1. */
MOE_API int64_t moe_file_find(const moe_file *file, const char *name);

/* Describes tensor `index`.
 *   record  in: struct_size; out: the rest
 *   index   0 <= index < count
 * Since 0.1. */
MOE_API moe_status moe_file_entry(const moe_file *file, int64_t index, moe_file_record *record);

/* Reads a tensor, or a range of its first dimension, row-major.
 *   to     out: [count, rest of the shape] elements of `dtype`
 *   first  first index of the first dimension; 0 for a scalar
 *   count  how many, or MOE_FILE_ALL
 *   dtype  what is wanted: the tensor's own, or another of f32, f64, bf16 and f16 (rounded to
 *          nearest even, too large becomes infinite), or another of i32 and i64
 * Any number of threads may read one file. Returns MOE_OK, the codes above or
 *   MOE_ERROR_NOT_SUPPORTED  no such conversion
 *   MOE_ERROR_OVERFLOW       an i64 does not fit in i32
 *   MOE_ERROR_SYSTEM         also a file that became shorter since it was opened
 * After the last two `to` is unspecified. Since 0.1. */
MOE_API moe_status moe_file_read(const moe_file *file, int64_t index, void *to, int64_t first,
                                 int64_t count, int32_t dtype);

/* The number of metadata strings; 0 for NULL. Those of the index for a sharded checkpoint, numbers
 * as text. Since 0.1. */
MOE_API int64_t moe_file_metadata_count(const moe_file *file);

/* Key and value of metadata string `index`, in order of key. They live until the file is closed.
 *   key, value  out; untouched on error
 * Since 0.1. */
MOE_API moe_status moe_file_metadata(const moe_file *file, int64_t index, const char **key,
                                     const char **value);

/* The metadata string of a key, or NULL if there is none or an argument is NULL. Since 0.1. */
MOE_API const char *moe_file_metadata_find(const moe_file *file, const char *key);

/* ---- checkpoints ----------------------------------------------------------------------------- */

/* One thing in a checkpoint: a layer's parameters, host tensors that are shaped as a layer's
 * parameters (moments of an optimizer), or one host tensor.
 *
 *     layer, no values   entries name + "gate.weight", name + "experts.3.w1", ...
 *     layer, values      the same names, with the contents of `values`
 *     no layer           one entry `name`, the same on every rank; rank 0's is saved */
typedef struct moe_checkpoint_item {
    uint64_t struct_size;
    const char *name;    /* a prefix, "layers.3."; or the name of a host tensor. May be "" for a
                         layer */
    moe_layer *layer;    /* or NULL: a host tensor */
    void *const *values; /* [moe_layer_parameter_count(layer)] or NULL; each as the parameter's
                            local shape, contiguous, of its dtype; of an opaque one element_count
                            elements in its order. NULL entries are left out, the same ones on
                            every rank. Read by a save, written by a load */
    void *data;          /* of a host tensor: row-major. Read by a save, written by a load */
    int64_t shape[MOE_FILE_MAX_DIMS]; /* of a host tensor */
    int32_t dims;                     /* likewise, 0 to MOE_FILE_MAX_DIMS; 0: one number */
    int32_t dtype;                    /* likewise, MOE_DTYPE_*; default f32 */
} moe_checkpoint_item;

/* Writes every default (0) and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_checkpoint_item_init(moe_checkpoint_item *item, size_t size);

/* How a checkpoint is saved. */
typedef struct moe_save_options {
    uint64_t struct_size;
    const char *const *metadata_keys;   /* [metadata_count] UTF-8, distinct, none beginning with
                                         "libmoe." */
    const char *const *metadata_values; /* [metadata_count] UTF-8 */
    int64_t metadata_count;
    moe_comm *comm;      /* NULL: the group of the layers, which must all have the same */
    int32_t store_dtype; /* of parameters, values and floating-point tensors: MOE_DTYPE_F32,
                            _F64, _BF16, _F16; default MOE_SAME: as they are */
    int32_t reserved;    /* 0 */
} moe_save_options;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_save_options_init(moe_save_options *options, size_t size);

/* Saves items into one safetensors file.
 *   path     where; a file that is there is replaced at the end, in one step, if all went well, and
 *            untouched otherwise. On several ranks a file system that all of them see
 *   items    in: [count]; structs of one struct_size, one after the other
 *   options  NULL for the defaults
 * The bytes depend on the parameters, names and metadata only: not on the number of ranks, layout,
 * GLU order or storage mode of the pools, strides, time or place. Each rank writes its own experts,
 * rank 0 all else. Data is on the disk when this returns MOE_OK. After MOE_ERROR_TIMEOUT or
 * MOE_ERROR_TRANSPORT the file is whole, the old one or the new one. Returns MOE_OK, the codes
 * above or
 *   MOE_ERROR_INVALID_ARGUMENT  also a name twice; ranks that disagree about the header
 *   MOE_ERROR_INVALID_STATE     a parameter is not bound
 * Since 0.1. */
MOE_API moe_status moe_checkpoint_save(const char *path, const moe_checkpoint_item *items,
                                       int64_t count, const moe_save_options *options);

/* How a checkpoint is loaded. */
typedef struct moe_load_options {
    uint64_t struct_size;
    moe_comm *comm;      /* as of moe_save_options */
    moe_log_fn report;   /* one line for each entry that is missing or left over; may be NULL */
    void *report_user;   /* handed to it */
    int32_t lenient;     /* 1: entries of the items that the file lacks are left as they are, and
                            those of the file that no item has are passed over; default 0: both
                            are errors */
    int32_t convert;     /* 1: from f32, f64, bf16, f16 to another one, and from i32 to i64 and
                            back; default 0: dtypes must be equal */
    int32_t write_bound; /* 1: the host allows that its bound data is written; default 0: bound
                            parameters are refused */
    int32_t reserved;    /* 0 */
} moe_load_options;

/* What a load found; the same on every rank. */
typedef struct moe_load_report {
    uint64_t struct_size;
    int64_t loaded;     /* entries read, by all ranks together */
    int64_t missing;    /* entries of the items that the file lacks */
    int64_t unexpected; /* entries of the file that no item has */
} moe_load_report;

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_load_options_init(moe_load_options *options, size_t size);
/* As above, for a report. Since 0.1. */
MOE_API moe_status moe_load_report_init(moe_load_report *report, size_t size);

/* Loads items from a file that moe_checkpoint_save, or another program, has made.
 *   path     as for moe_file_open
 *   items    in: [count] as for moe_checkpoint_save; parameters, values and data are written
 *   options  NULL for the defaults
 *   report   in: struct_size; out; may be NULL. Written if this returns MOE_OK
 * Each rank reads what it holds. Every name, shape and dtype on every rank is checked before
 * anything is written. Pools are told moe_experts_weights_changed. Returns MOE_OK, the codes above
 * or
 *   MOE_ERROR_INVALID_ARGUMENT  a tensor is missing, left over, or of another shape or dtype: the
 *                               message has its name, what is wanted and what was found
 *   MOE_ERROR_INVALID_STATE     a parameter is not bound, or bound without write_bound
 *   MOE_ERROR_CORRUPT_DATA      as moe_file_open
 *   MOE_ERROR_SYSTEM            the disk failed: after a failing read of data, what was to be
 *                               written is unspecified
 * Since 0.1. */
MOE_API moe_status moe_checkpoint_load(const char *path, const moe_checkpoint_item *items,
                                       int64_t count, const moe_load_options *options,
                                       moe_load_report *report);

/* ---- models of other programs ---------------------------------------------------------------- */

/* Naming of a family's MoE blocks, as in the files of transformers. */
enum {
    MOE_FAMILY_MIXTRAL = 0,   /* block_sparse_moe.gate, .experts.N.w1, w3, w2 */
    MOE_FAMILY_QWEN3_MOE = 1, /* mlp.gate, mlp.experts.N.gate_proj, up_proj, down_proj; OLMoE too */
    MOE_FAMILY_QWEN2_MOE = 2, /* and mlp.shared_expert, mlp.shared_expert_gate */
    MOE_FAMILY_DEEPSEEK_V3 = 3, /* and mlp.shared_experts, e_score_correction_bias; V2 too */
    MOE_FAMILY_GPT_OSS = 4 /* mlp.router, mlp.experts.gate_up_proj (interleaved), down_proj, with
                                   biases; bf16 or MXFP4 */
};

/* Names of tensors. In each {layer} stands for the block's number and {expert} for an expert's.
 * NULL: there is none. An expert tensor without {expert} holds all of them, [E,...]. Of shared
 * experts {expert} is that of the shared pool; without it one matrix is as wide as all of them side
 * by side. A layer has W1 as gate projection and W3 as up projection.
 *
 * A matrix that is not there under its name is looked for as NAME_blocks and NAME_scales (MXFP4,
 * always [out,in]); one in F8_E4M3 wants NAME_scale_inv (blocks of 128 x 128). */
typedef struct moe_tensor_names {
    uint64_t struct_size;
    const char *gate;           /* [E,D] */
    const char *gate_bias;      /* [E] */
    const char *selection_bias; /* [E] */
    const char *w1, *w3;        /* [F,D], or [D,F] with MOE_WEIGHT_IN_OUT */
    const char *w13;            /* both in one, [2F,D] or [D,2F], instead of w1 and w3 */
    const char *w2;             /* [O,F] or [F,O] */
    const char *b1, *b3;        /* [F] */
    const char *b13;            /* [2F] */
    const char *b2;             /* [O] */
    const char *shared_w1, *shared_w3, *shared_w2;
    const char *shared_gate; /* [1,D] or [D] */
    int32_t weight_layout;   /* MOE_WEIGHT_* of expert matrices; default MOE_WEIGHT_OUT_IN */
    int32_t glu_order;       /* MOE_GLU_GATE_UP, _UP_GATE or _INTERLEAVED, of w13 and b13; default
                                  MOE_GLU_GATE_UP */
} moe_tensor_names;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_tensor_names_init(moe_tensor_names *names, size_t size);

/* Writes the names of a family, to be changed and handed to moe_import; static storage.
 *   names   in: struct_size; out: the rest
 *   family  MOE_FAMILY_*
 * Since 0.1. */
MOE_API moe_status moe_family_names(moe_tensor_names *names, int32_t family);

/* How a model's block is imported. */
typedef struct moe_import_options {
    uint64_t struct_size;
    const moe_tensor_names *names; /* NULL: the family's */
    int32_t lenient;     /* 1: parameters for which names have nothing, and tensors for which the
                            layer has no parameter, are passed over; default 0: refused */
    int32_t write_bound; /* as of moe_load_options */
} moe_import_options;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_import_options_init(moe_import_options *options, size_t size);

/* Copies one block of a model into a layer's parameters, converted to the layer's dtype, whatever
 * the layouts. Each rank reads what it holds.
 *   layer    its gate, pool and shared pool are written
 *   file     open; of the same model on every rank
 *   family   MOE_FAMILY_*; not looked at if options have names
 *   block    what {layer} stands for, >= 0
 *   options  NULL for the defaults
 * All is checked before anything is written. Only weights: what the gate does with its logits is
 * the config's business, see moe_preset. Returns as moe_checkpoint_load. Since 0.1. */
MOE_API moe_status moe_import(moe_layer *layer, const moe_file *file, int32_t family, int64_t block,
                              const moe_import_options *options);

/* Saves a layer's parameters under the names of a family, in one file, so that moe_import or the
 * family's own program reads them. A parameter for which the names have nothing is refused.
 *   path     as of moe_checkpoint_save
 *   names    NULL: the family's
 *   options  NULL for the defaults
 * Returns as moe_checkpoint_save. Since 0.1. */
MOE_API moe_status moe_export(const char *path, moe_layer *layer, int32_t family, int64_t block,
                              const moe_tensor_names *names, const moe_save_options *options);

/* ---- from a dense network -------------------------------------------------------------------- */

/* A dense feed-forward network and how experts are made of it (Komatsuzaki et al. 2022, arXiv
 * 2212.05055). Its width H is the pool's F, or a multiple G F: then expert e gets slice e mod G of
 * the hidden units (He et al. 2024, arXiv 2410.07524). */
typedef struct moe_upcycle_args {
    uint64_t struct_size;
    const void *w1, *w3, *w2; /* in: [H,D], [H,D], [O,H], or [D,H], [D,H], [H,O] with
                                  MOE_WEIGHT_IN_OUT; w3 for gated activations only */
    const void *b1, *b3, *b2; /* in: [H], [H], [O]; for pools with biases, NULL = 0 */
    const moe_file *file;     /* NULL: the memory above; else the tensors are read from here, by
                                  the names below */
    const char *w1_name, *w3_name, *w2_name;
    const char *b1_name, *b3_name, *b2_name; /* NULL: none */
    int64_t width;                           /* H; 0: that of the file */
    double noise_std;      /* of normal noise added to every weight matrix, of each expert its own;
                              default 0 */
    double noise_fraction; /* of the elements, chosen at random, that get it; default 1 */
    double output_scale;   /* of w2; default 1. G where the weights of the G slices are 1/G each */
    uint64_t seed;         /* of the noise, which is the same for any layout and number of ranks */
    int32_t dtype;         /* MOE_DTYPE_* of the memory; default f32 */
    int32_t weight_layout; /* MOE_WEIGHT_*; default MOE_WEIGHT_OUT_IN */
    int32_t write_bound;   /* as of moe_load_options */
    int32_t reserved;      /* 0 */
} moe_upcycle_args;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_upcycle_args_init(moe_upcycle_args *args, size_t size);

/* Makes every expert of a layer's pool a copy, or a slice, of a dense network. Gate, shared and
 * residual experts stay as they are. With weights that sum to 1, no slices and no noise the layer
 * then computes what the dense network did.
 *   layer  its feed-forward experts are written; other kinds are passed over
 *   args   required
 * All is checked before anything is written; exchanges nothing, so that it is each rank's own call.
 * Returns MOE_OK or the codes of moe_checkpoint_load. Since 0.1. */
MOE_API moe_status moe_upcycle(moe_layer *layer, const moe_upcycle_args *args);

MOE_END_DECLS

#endif
