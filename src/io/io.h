/* io.h - what the files of libmoe_io share: open files, tables of what is to be moved between a
 * file and memory, and the verdict of a group.
 *
 *     plan     entries (tensors of a file) and blocks (runs of an entry that this rank moves)
 *     block    [rows,cols] contiguous elements of an entry
 *     source   a view of memory that is some rows and columns of a block
 *
 * names.c and families.c make plans, header.c lays one out as a file, move.c moves blocks. */
#ifndef MOE_IO_INTERNAL_H
#define MOE_IO_INTERNAL_H

#include "internal.h"
#include "module.h"

#include <moe/io.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "libmoe_io is for little-endian machines"
#endif

/* ---- errors (errors.c) ----------------------------------------------------------------------- */

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
moe_status
moe__io_fail(moe_status status, const char *function, const char *format, ...);

#undef REFUSE
#define REFUSE(status, ...) return moe__io_fail(status, function, __VA_ARGS__)
#define REFUSE_CORRUPT(...) REFUSE(MOE_ERROR_CORRUPT_DATA, __VA_ARGS__)
#define REFUSE_MEMORY() REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory")

/* "cannot `verb` `path`: reason" of errno. */
moe_status moe__io_system(const char *function, const char *verb, const char *path, int error);

/* MOE_ERROR_NOT_SUPPORTED unless libmoe is of this module's build. */
moe_status moe__io_enter(const char *function);

/* Structs of the caller: as moe__struct_read; and for output ones a check, and writing back. */
#define MOE__IO_READ(info, known, from, function) \
    moe__module_struct_read(&(info), known, from, function)
moe_status moe__io_check_out(const moe__struct_info *info, const void *to, const char *function);
void moe__io_write_out(const moe__struct_info *info, void *to, const void *known);

extern const moe__struct_info moe__io_item_info, moe__io_save_info, moe__io_load_info,
    moe__io_report_info, moe__io_names_info, moe__io_import_info, moe__io_upcycle_info,
    moe__io_record_info;

/* Room for one more in a growing array; false if there is no memory. */
bool moe__io_grow(void **array, int64_t *room, int64_t count, size_t size);
char *moe__io_copy_string(const char *text);
bool moe__io_is_utf8(const char *text);
bool moe__io_has_control(const char *text);

/* ---- element types (convert.c) --------------------------------------------------------------- */

int64_t moe__io_dtype_size(int32_t dtype);       /* 0: no dtype */
const char *moe__io_dtype_name(int32_t dtype);   /* "F32" */
int32_t moe__io_dtype_of_name(const char *name); /* -1: unknown */
bool moe__io_is_float(int32_t dtype);            /* f32, f64, bf16, f16 */
bool moe__io_convertible(int32_t to, int32_t from);
/* n elements; both arrays of their own dtypes, which are convertible and not both alike. Returns
 * -1, or the first element that does not fit (i64 to i32). */
int64_t moe__io_convert(void *to, int32_t to_dtype, const void *from, int32_t from_dtype,
                        int64_t n);
float moe__io_f8_e4m3(uint8_t bits);
/* Element i of an array of floating-point numbers. */
double moe__io_element(const void *from, int32_t dtype, int64_t i);
void moe__io_set_element(void *to, int32_t dtype, int64_t i, double value);

/* ---- files (file.c, header_read.c, shards.c) ------------------------------------------------- */

typedef struct moe__io_tensor {
    char *name;
    int64_t shape[MOE_FILE_MAX_DIMS];
    int64_t count, bytes;
    int64_t offset; /* in its shard */
    int32_t shard, dims, dtype;
} moe__io_tensor;

typedef struct moe__io_shard {
    char *path;
    int64_t size;
    int fd;
} moe__io_shard;

typedef struct moe__io_pair {
    char *key, *value;
} moe__io_pair;

struct moe_file {
    moe__io_shard *shard;
    moe__io_tensor *tensor; /* in order of name */
    moe__io_pair *metadata; /* in order of key */
    int64_t shards, shard_room, count, tensor_room, metadata_count, metadata_room;
};

enum { MOE__IO_HEADER_MAX = 100000000 }; /* as the reference implementation */

/* Opens a file as the next shard. */
moe_status moe__io_add_shard(moe_file *file, const char *path, const char *function);
void moe__io_close_shards(moe_file *file);
/* Reads and checks the header of the last shard; its tensors are added, its metadata if wanted. */
moe_status moe__io_read_header(moe_file *file, bool metadata, const char *function);
moe_status moe__io_add_metadata(moe_file *file, const char *key, const char *value,
                                const char *function);
/* An index: opens the shards it names and reads their headers. */
moe_status moe__io_read_index(moe_file *file, const char *path, const char *function);
/* Brackets no deeper than depth, arrays of at most `elements`: before a parser is let on it. */
moe_status moe__io_check_json(const char *text, int64_t bytes, int depth, int64_t elements,
                              const char *path, const char *function);
/* Tensors in order of name, none twice. */
moe_status moe__io_sort_tensors(moe_file *file, const char *function);
moe_status moe__io_pread(const moe_file *file, int32_t shard, void *to, int64_t bytes,
                         int64_t offset, const char *function);

/* ---- parameters of a layer (layout.c) -------------------------------------------------------- */

enum { IO_GATE, IO_ROUTED, IO_SHARED, IO_RESIDUAL, IO_LAYER };
enum { IO_W1, IO_W3, IO_W2, IO_B1, IO_B3, IO_B2, IO_POOL_TENSORS };

/* One logical tensor of a layer: a parameter, or half of a fused one. Of a pool: [rows,cols] of
 * each expert, rows the outputs and cols the inputs; vectors have one row. Else all of it is in
 * `record`. */
typedef struct moe__io_parameter {
    moe_parameter_record record;
    int64_t index;        /* in the layer */
    void *values;         /* instead of the data of `record`: contiguous; or NULL */
    int64_t begin, all;   /* number of the first expert of all ranks, how many they have */
    int64_t first, local; /* of this rank */
    const int64_t *numbers, *local_of; /* [local], [all], -1: none; NULL: `first` and on */
    int64_t rows, cols;                /* of each expert */
    int64_t origin, stride_expert, stride_row, stride_col; /* elements */
    int32_t owner, tensor;                                 /* IO_*; tensor of pools */
    int32_t part;
    int32_t reserved;
} moe__io_parameter;

/* A parameter in opaque storage, which is moved by way of dense memory. */
typedef struct moe__io_staged {
    int64_t index; /* in the layer */
    void *opaque;  /* the host's `values` in its order; NULL: the parameter itself */
    void *dense;   /* of its shape */
} moe__io_staged;

typedef struct moe__io_layer {
    const moe_layer *layer;
    moe_layer_config config;
    moe_gate_config gate;
    moe__io_parameter *parameter;
    int64_t count, room;
    moe__io_staged *staged;
    int64_t staged_count, staged_room;
    int64_t *numbers; /* of a placement: of this rank's experts, then where each of all is here */
    int32_t size;     /* ranks */
    int32_t values;   /* 1: the memory is `values` */
} moe__io_layer;

/* The number of an expert that is here, and which one here a number is, or -1. */
static inline int64_t moe__io_number(const moe__io_parameter *p, int64_t local)
{
    return p->begin + (p->numbers ? p->numbers[local] : p->first - p->begin + local);
}
static inline int64_t moe__io_local(const moe__io_parameter *p, int64_t number)
{
    if (p->local_of) return p->local_of[number - p->begin];
    return number >= p->first && number < p->first + p->local ? number - p->first : -1;
}

/* values: as of moe_checkpoint_item, or NULL. */
moe_status moe__io_describe(moe__io_layer *description, const moe_layer *layer, void *const *values,
                            const char *function);
/* Of a layer whose experts are whole, the parameters themselves; one of slices is refused. */
moe_status moe__io_describe_whole(moe__io_layer *description, const moe_layer *layer,
                                  const char *function);
void moe__io_describe_free(moe__io_layer *description);
/* First element of an expert here (0 to local - 1). */
char *moe__io_expert_base(const moe__io_parameter *p, int64_t expert);
const char *moe__io_tensor_name(int32_t tensor); /* "w1" */
/* MOE_ERROR_INVALID_STATE if a parameter has no memory, or may not be written. */
moe_status moe__io_check_memory(const moe__io_layer *description, bool to_write, bool write_bound,
                                const char *function);
/* All has been written: what is staged goes where it belongs, and pools of the layer are told that
 * weights changed. */
moe_status moe__io_written(const moe__io_layer *description, const char *function);

/* ---- plans (plan.c) -------------------------------------------------------------------------- */

enum { IO_PLAIN, IO_MXFP4, IO_F8 };

typedef struct moe__io_entry {
    char *name;
    int64_t shape[MOE_FILE_MAX_DIMS];
    int64_t count, bytes, offset;
    int64_t file_index, scale_index; /* of the tensor in an open file; -1 */
    int32_t dims;
    int32_t dtype;  /* of the file to be written */
    int32_t memory; /* of the memory */
    int32_t coding; /* IO_* */
    int32_t loose;  /* 1: leading dimensions of 1 do not count */
    int32_t reserved;
} moe__io_entry;

typedef struct moe__io_block {
    int64_t entry, first; /* elements before it in the entry */
    int64_t rows, cols;
    int64_t source; /* the first of a list; -1 */
} moe__io_block;

typedef struct moe__io_source {
    char *base;
    int64_t row, row_step, rows, col, col_step, cols; /* where in the block */
    int64_t stride_row, stride_col;                   /* in memory, elements */
    int64_t next;                                     /* source, or -1 */
} moe__io_source;

typedef struct moe__io_plan {
    moe__io_entry *entry;
    moe__io_block *block;
    moe__io_source *source;
    int64_t entries, entry_room, blocks, block_room, sources, source_room;
    moe__io_pair *metadata; /* borrowed strings */
    int64_t metadata_count;
    int32_t store_dtype; /* MOE_SAME: as memory */
    int32_t reserved;
    char *header; /* with the eight bytes of its length */
    int64_t header_bytes, file_bytes;
} moe__io_plan;

/* A layer under a model's names. */
typedef struct moe__io_model {
    const moe_tensor_names *names;
    const moe_file *file; /* NULL: to be written */
    int64_t experts;      /* of the layer, over all ranks and parts */
    int64_t block;
    int32_t rank; /* -1: every rank moves what is replicated; else rank 0 does */
    int32_t lenient;
} moe__io_model;

void moe__io_plan_free(moe__io_plan *plan);
/* Adds an entry. Returns its number or -1 without memory; name is copied. */
int64_t moe__io_add_entry(moe__io_plan *plan, const char *name, int32_t memory, int32_t dims,
                          const int64_t *shape);
/* Adds a block; its number or -1. */
int64_t moe__io_add_block(moe__io_plan *plan, int64_t entry, int64_t first, int64_t rows,
                          int64_t cols);
/* Adds a view of the whole block, to be changed; NULL without memory. */
moe__io_source *moe__io_add_source(moe__io_plan *plan, int64_t block, char *base,
                                   int64_t stride_row, int64_t stride_col);

/* names.c: items of a checkpoint. */
moe_status moe__io_plan_items(moe__io_plan *plan, moe__io_layer **layers, int64_t *layer_count,
                              const moe_checkpoint_item *items, int64_t count, int32_t rank,
                              const char *function);
void moe__io_layers_free(moe__io_layer *layers, int64_t count);
/* families.c: a layer under a model's names, with `file` as they are there. */
moe_status moe__io_plan_model(moe__io_plan *plan, const moe__io_layer *layer,
                              const moe__io_model *model, const char *function);

/* header.c: offsets and the header. Names must be distinct. */
moe_status moe__io_lay_out(moe__io_plan *plan, const char *function);
uint64_t moe__io_hash(const void *bytes, int64_t count);

/* match.c: the file's tensors for the entries; missing ones have file_index -1. */
moe_status moe__io_match(moe__io_plan *plan, const moe_file *file, const moe_load_options *options,
                         moe_load_report *report, const char *function);
/* What the file has and no entry is. */
moe_status moe__io_find_unexpected(const moe__io_plan *plan, const moe_file *file,
                                   const moe_load_options *options, moe_load_report *report,
                                   const char *function);
/* A shape as "[2,3]". */
const char *moe__io_shape_text(char *text, size_t size, const int64_t *shape, int32_t dims);

/* move.c: every block of the plan. */
moe_status moe__io_read_blocks(const moe__io_plan *plan, const moe_file *file,
                               const char *function);
moe_status moe__io_write_blocks(const moe__io_plan *plan, int fd, const char *path,
                                const char *function);
moe_status moe__io_pwrite(int fd, const void *from, int64_t bytes, int64_t offset, const char *path,
                          const char *function);

/* save.c: lays the plan out as a file at `path`. */
typedef struct moe__io_group {
    moe_comm *comm; /* NULL: one rank */
    int32_t rank, size;
} moe__io_group;
moe_status moe__io_save(moe__io_plan *plan, const char *path, const moe__io_group *group,
                        moe_status so_far, const char *function);
moe_status moe__io_read_save_options(moe__io_plan *plan, moe_save_options *known,
                                     const moe_save_options *options, const char *function);

/* ---- the verdict of a group (agree.c) -------------------------------------------------------- */

/* The one group of all items' layers; `comm` of the options if given. */
moe_status moe__io_find_group(moe__io_group *group, moe_comm *comm,
                              const moe_checkpoint_item *items, int64_t count,
                              const char *function);
/* Every rank's status becomes the first failing rank's; `hash` must be the same on all; *number
 * becomes rank 0's. NULL: none. */
moe_status moe__io_agree(const moe__io_group *group, moe_status status, uint64_t hash,
                         int64_t *number, const char *function);

#endif
