/* families.c - a layer under the names of a model's files.
 *
 * A pool's tensor is one entry for each expert; or, without {expert} in its name, one entry [E,...]
 * for all routed ones, and for shared ones a matrix as wide as all of them side by side. W1 and W3
 * may be one entry, in halves or interleaved. */
#include "io.h"

#include <stdio.h>
#include <string.h>

static void names_defaults(void *instance)
{
    *(moe_tensor_names *)instance = (moe_tensor_names){.weight_layout = MOE_WEIGHT_OUT_IN,
                                                       .glu_order = MOE_GLU_GATE_UP};
}

const moe__struct_info moe__io_names_info = MOE__STRUCT_INFO(moe_tensor_names, names_defaults);

moe_status moe_tensor_names_init(moe_tensor_names *names, size_t size)
{
    return moe__module_struct_init(&moe__io_names_info, names, size, __func__);
}

/* ---- the families ---------------------------------------------------------------------------- */

#define MLP(rest) "model.layers.{layer}.mlp." rest
#define SPARSE(rest) "model.layers.{layer}.block_sparse_moe." rest
#define PROJECTIONS                                                                               \
    .gate = MLP("gate.weight"), .w1 = MLP("experts.{expert}.gate_proj.weight"),                   \
    .w3 = MLP("experts.{expert}.up_proj.weight"), .w2 = MLP("experts.{expert}.down_proj.weight"), \
    .weight_layout = MOE_WEIGHT_OUT_IN, .glu_order = MOE_GLU_GATE_UP
#define SHARED(name)                                                                      \
    .shared_w1 = MLP(name ".gate_proj.weight"), .shared_w3 = MLP(name ".up_proj.weight"), \
    .shared_w2 = MLP(name ".down_proj.weight")

static const moe_tensor_names FAMILIES[] = {
    [MOE_FAMILY_MIXTRAL] = {.gate = SPARSE("gate.weight"),
                            .w1 = SPARSE("experts.{expert}.w1.weight"),
                            .w3 = SPARSE("experts.{expert}.w3.weight"),
                            .w2 = SPARSE("experts.{expert}.w2.weight"),
                            .weight_layout = MOE_WEIGHT_OUT_IN,
                            .glu_order = MOE_GLU_GATE_UP},
    [MOE_FAMILY_QWEN3_MOE] = {PROJECTIONS},
    [MOE_FAMILY_QWEN2_MOE] = {PROJECTIONS, SHARED("shared_expert"),
                              .shared_gate = MLP("shared_expert_gate.weight")},
    [MOE_FAMILY_DEEPSEEK_V3] = {PROJECTIONS, SHARED("shared_experts"),
                                .selection_bias = MLP("gate.e_score_correction_bias")},
    [MOE_FAMILY_GPT_OSS] = {.gate = MLP("router.weight"),
                            .gate_bias = MLP("router.bias"),
                            .w13 = MLP("experts.gate_up_proj"),
                            .b13 = MLP("experts.gate_up_proj_bias"),
                            .w2 = MLP("experts.down_proj"),
                            .b2 = MLP("experts.down_proj_bias"),
                            .weight_layout = MOE_WEIGHT_IN_OUT,
                            .glu_order = MOE_GLU_INTERLEAVED}};

moe_status moe_family_names(moe_tensor_names *names, int32_t family)
{
    const char *function = __func__;
    MOE_TRY(moe__io_check_out(&moe__io_names_info, names, function));
    if (family < 0 || family > MOE_FAMILY_GPT_OSS)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "family is %d", (int)family);
    moe__io_write_out(&moe__io_names_info, names, &FAMILIES[family]);
    return MOE_OK;
}

/* ---- names ----------------------------------------------------------------------------------- */

enum { NAME_BYTES = 512 };

static bool has_expert(const char *pattern) { return strstr(pattern, "{expert}") != NULL; }

static moe_status expand(char *name, const char *pattern, int64_t block, int64_t expert,
                         const char *function)
{
    size_t used = 0;
    if (moe__io_has_control(pattern) || !moe__io_is_utf8(pattern))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "a name is no UTF-8 without control characters");
    for (const char *c = pattern; *c && used < NAME_BYTES; c++) {
        bool layer = strncmp(c, "{layer}", 7) == 0, number = strncmp(c, "{expert}", 8) == 0;
        if (layer || number) {
            used += (size_t)snprintf(name + used, NAME_BYTES - used, "%lld",
                                     (ll)(layer ? block : expert));
            c += layer ? 6 : 7;
        } else if (*c == '{' || *c == '}') {
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the name %.200s has braces around something else",
                   pattern);
        } else {
            name[used++] = *c;
        }
    }
    if (used >= NAME_BYTES - 16)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the name %.200s is too long", pattern);
    name[used] = 0;
    return MOE_OK;
}

/* A matrix's tensor in the file, plain or quantised, into the entry. */
static void find_coding(moe__io_entry *e, const moe_file *file)
{
    char name[NAME_BYTES + 16];
    e->file_index = moe_file_find(file, e->name);
    if (e->file_index >= 0) {
        if (file->tensor[e->file_index].dtype != MOE_FILE_F8_E4M3) return;
        (void)snprintf(name, sizeof name, "%s_scale_inv", e->name);
        e->scale_index = moe_file_find(file, name);
        if (e->scale_index >= 0) e->coding = IO_F8;
        return;
    }
    (void)snprintf(name, sizeof name, "%s_blocks", e->name);
    e->file_index = moe_file_find(file, name);
    (void)snprintf(name, sizeof name, "%s_scales", e->name);
    e->scale_index = moe_file_find(file, name);
    if (e->file_index >= 0 && e->scale_index >= 0)
        e->coding = IO_MXFP4;
    else
        e->file_index = e->scale_index = -1;
}

/* ---- a tensor of a pool ---------------------------------------------------------------------- */

/* One or two parameters (gate and up projection) under one pattern. */
typedef struct group {
    const moe__io_parameter *p[2];
    const char *pattern;
    int halves;
    bool matrix, stacked, beside; /* one entry for all; side by side as one matrix */
    bool in_out;                  /* the file's order */
} group;

/* Sizes of an entry's outputs and inputs. */
static void extent(const group *g, int64_t *out, int64_t *in)
{
    const moe__io_parameter *p = g->p[0];
    *out = (g->matrix ? p->rows : p->cols) * g->halves;
    *in = g->matrix ? p->cols : 1;
    if (!g->beside) return;
    if (p->tensor == IO_W2 || p->tensor == IO_B2)
        *in *= p->all;
    else
        *out *= p->all;
}

/* A view of expert e's parameters in a block. */
static bool add_views(moe__io_plan *plan, const moe__io_model *m, const group *g, int64_t block,
                      int64_t e)
{
    int32_t order = m->names->glu_order;
    for (int k = 0; k < g->halves; k++) {
        const moe__io_parameter *p = g->p[k];
        int64_t out = g->matrix ? p->rows : p->cols,
                out_stride = g->matrix ? p->stride_row : p->stride_col;
        moe__io_source *s = moe__io_add_source(plan, block, moe__io_expert_base(p, e), out_stride,
                                               p->stride_col);
        int64_t first = 0, step = 1, in_first = 0;
        if (!s) return false;
        if (g->halves == 2 && order == MOE_GLU_INTERLEAVED) first = k, step = 2;
        if (g->halves == 2 && order != MOE_GLU_INTERLEAVED)
            first = (k == 1) == (order == MOE_GLU_GATE_UP) ? out : 0;
        if (g->beside && p->tensor == IO_W2) in_first = e * p->cols;
        if (g->beside && p->tensor != IO_W2) first = e * out;
        if (!g->matrix) {
            s->col = first, s->col_step = step, s->cols = out;
        } else if (g->in_out) {
            s->row = in_first, s->rows = p->cols, s->stride_row = p->stride_col;
            s->col = first, s->col_step = step, s->cols = out, s->stride_col = p->stride_row;
        } else {
            s->row = first, s->row_step = step, s->rows = out;
            s->col = in_first, s->cols = p->cols;
        }
    }
    return true;
}

/* An entry of one expert, or of all. MXFP4 is always [out,in], whatever the names say. */
static moe_status add_entry(moe__io_plan *plan, const moe__io_model *m, group *g, int64_t expert,
                            int64_t *entry, const char *function)
{
    char name[NAME_BYTES];
    int64_t shape[3] = {g->p[0]->all, 0, 0}, out, in;
    int32_t dims = 0;
    MOE_TRY(expand(name, g->pattern, m->block, expert, function));
    extent(g, &out, &in);
    bool stacked = g->stacked && !g->beside;
    moe__io_entry probe = {.name = name};
    if (m->file && g->matrix) find_coding(&probe, m->file);
    g->in_out = m->names->weight_layout == MOE_WEIGHT_IN_OUT && probe.coding != IO_MXFP4;
    dims = stacked;
    if (!g->matrix) shape[dims++] = out;
    if (g->matrix) shape[dims++] = g->in_out ? in : out;
    if (g->matrix) shape[dims++] = g->in_out ? out : in;
    *entry = moe__io_add_entry(plan, name, g->p[0]->record.data_dtype, dims, shape);
    if (*entry < 0) REFUSE_MEMORY();
    moe__io_entry *e = &plan->entry[*entry];
    e->coding = probe.coding;
    if (e->coding != IO_PLAIN) e->file_index = probe.file_index, e->scale_index = probe.scale_index;
    if (e->count < 0 || e->bytes < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%.200s does not fit in 63 bits", name);
    return MOE_OK;
}

static moe_status add_group(moe__io_plan *plan, const moe__io_model *m, group *g, bool mine,
                            const char *function)
{
    const moe__io_parameter *p = g->p[0];
    int64_t entry = -1, out, in, block = -1;
    g->matrix = p->tensor <= IO_W2;
    g->stacked = !has_expert(g->pattern);
    g->beside = g->stacked && p->owner == IO_SHARED;
    if (g->stacked && p->begin > 0)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "%.200s for all experts and a pool of parts", g->pattern);
    extent(g, &out, &in);
    for (int64_t e = p->begin; e < p->begin + p->all; e++) {
        int64_t local = moe__io_local(p, e);
        bool first = e == p->begin, here = mine && local >= 0;
        if (first || !g->stacked) MOE_TRY(add_entry(plan, m, g, e, &entry, function));
        if (!here) continue;
        if (!g->beside || block < 0)
            block = moe__io_add_block(plan, entry,
                                      g->stacked && !g->beside ? (e - p->begin) * out * in : 0,
                                      !g->matrix  ? 1
                                      : g->in_out ? in
                                                  : out,
                                      !g->matrix  ? out
                                      : g->in_out ? out
                                                  : in);
        if (block < 0 || !add_views(plan, m, g, block, local)) REFUSE_MEMORY();
    }
    return MOE_OK;
}

/* ---- what is there and what is not ----------------------------------------------------------- */

/* Refuses a tensor that the file has and the layer has no place for. */
static moe_status check_absent(const moe__io_model *m, const char *pattern, int64_t expert,
                               const char *what, const char *function)
{
    char name[NAME_BYTES];
    if (!pattern || !m->file || m->lenient) return MOE_OK;
    MOE_TRY(expand(name, pattern, m->block, expert, function));
    if (moe_file_find(m->file, name) >= 0)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the file has %.300s, the layer has %s", name, what);
    return MOE_OK;
}

static moe_status no_name(const moe__io_model *m, const char *parameter, const char *function)
{
    if (m->lenient) return MOE_OK;
    REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the names have nothing for the layer's %s", parameter);
}

typedef struct pool_names {
    const char *one[IO_POOL_TENSORS], *w13, *b13;
} pool_names;

static moe_status plan_tensor(moe__io_plan *plan, const moe__io_model *m,
                              const moe__io_parameter *p, const char *pattern, bool mine,
                              const char *function)
{
    group g = {.p = {p, NULL}, .pattern = pattern, .halves = 1};
    if (!p) return check_absent(m, pattern, 0, "no parameter for it", function);
    if (!pattern) return no_name(m, p->record.name, function);
    MOE_TRY(add_group(plan, m, &g, mine, function));
    if (!has_expert(pattern)) return MOE_OK;
    char what[64];
    (void)snprintf(what, sizeof what, "%lld experts", (ll)(p->begin + p->all));
    return p->owner == IO_ROUTED && p->begin + p->all == m->experts
               ? check_absent(m, pattern, m->experts, what, function)
               : MOE_OK;
}

/* W1 and W3, or b1 and b3: under one pattern or two. */
static moe_status plan_pair(moe__io_plan *plan, const moe__io_model *m,
                            const moe__io_parameter *gate, const moe__io_parameter *up,
                            const char *both, const char *const one[2], bool mine,
                            const char *function)
{
    group g = {.p = {gate, up}, .pattern = both, .halves = 2};
    if (both && gate && up) return add_group(plan, m, &g, mine, function);
    if (both && (gate || up))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "%.200s is gate and up projection, the layer's experts are not gated", both);
    if (both) return check_absent(m, both, 0, "no parameter for it", function);
    MOE_TRY(plan_tensor(plan, m, gate, one[0], mine, function));
    return plan_tensor(plan, m, up, one[1], mine, function);
}

static moe_status plan_pool(moe__io_plan *plan, const moe__io_model *m, const moe__io_layer *l,
                            int32_t owner, int32_t part, const pool_names *n, const char *function)
{
    const moe__io_parameter *p[IO_POOL_TENSORS] = {NULL};
    bool any = false, mine = m->rank <= 0 || (owner == IO_ROUTED && l->size > 1);
    for (int64_t i = 0; i < l->count; i++)
        if (l->parameter[i].owner == owner && l->parameter[i].part == part)
            p[l->parameter[i].tensor] = &l->parameter[i], any = true;
    if (!any && part > 0) return MOE_OK;
    MOE_TRY(plan_pair(plan, m, p[IO_W1], p[IO_W3], n->w13, &n->one[IO_W1], mine, function));
    MOE_TRY(plan_tensor(plan, m, p[IO_W2], n->one[IO_W2], mine, function));
    MOE_TRY(plan_pair(plan, m, p[IO_B1], p[IO_B3], n->b13, &n->one[IO_B1], mine, function));
    return plan_tensor(plan, m, p[IO_B2], n->one[IO_B2], mine, function);
}

/* ---- gate and the layer's own ---------------------------------------------------------------- */

/* [D,E] as [E,D], or a vector; `loose`: [1,D] and [D] are one. */
static moe_status plan_replicated(moe__io_plan *plan, const moe__io_model *m,
                                  const moe__io_parameter *p, const char *pattern, bool loose,
                                  const char *function)
{
    const moe_parameter_record *r = &p->record;
    char name[NAME_BYTES];
    bool matrix = r->dims == 2;
    if (!pattern || r->dims > 2) return no_name(m, r->name, function);
    MOE_TRY(expand(name, pattern, m->block, 0, function));
    int64_t shape[2] = {matrix ? r->shape[1] : r->shape[0], r->shape[0]};
    int32_t dims = matrix ? 2 : 1;
    if (loose) shape[1] = shape[0], shape[0] = 1, dims = 2;
    int64_t entry = moe__io_add_entry(plan, name, r->data_dtype, dims, shape);
    if (entry < 0) REFUSE_MEMORY();
    plan->entry[entry].loose = loose;
    if (m->rank > 0) return MOE_OK;
    int64_t block = moe__io_add_block(plan, entry, 0, matrix ? shape[0] : 1,
                                      matrix ? shape[1] : r->shape[0]);
    if (block < 0 || !moe__io_add_source(plan, block, r->data, matrix ? r->data_stride[1] : 0,
                                         r->data_stride[0]))
        REFUSE_MEMORY();
    return MOE_OK;
}

typedef struct place {
    const char *parameter, *pattern;
    bool loose, found;
} place;

static moe_status plan_others(moe__io_plan *plan, const moe__io_model *m, const moe__io_layer *l,
                              const char *function)
{
    const moe_tensor_names *n = m->names;
    place places[] = {{"gate.weight", n->gate, false, false},
                      {"gate.bias", n->gate_bias, false, false},
                      {"gate.selection_bias", n->selection_bias, false, false},
                      {"shared_gate", n->shared_gate, true, false}};
    for (int64_t i = 0; i < l->count; i++) {
        const moe__io_parameter *p = &l->parameter[i];
        place *at = NULL;
        if (p->owner == IO_RESIDUAL) MOE_TRY(no_name(m, p->record.name, function));
        if (p->owner != IO_GATE && p->owner != IO_LAYER) continue;
        for (int k = 0; k < 4; k++)
            if (strcmp(places[k].parameter, p->record.name) == 0) at = &places[k];
        if (at) at->found = true;
        MOE_TRY(plan_replicated(plan, m, p, at ? at->pattern : NULL, at && at->loose, function));
    }
    for (int k = 0; k < 4; k++)
        if (!places[k].found)
            MOE_TRY(check_absent(m, places[k].pattern, 0, "no parameter for it", function));
    return MOE_OK;
}

moe_status moe__io_plan_model(moe__io_plan *plan, const moe__io_layer *l, const moe__io_model *m,
                              const char *function)
{
    const moe_tensor_names *n = m->names;
    const pool_names routed = {{n->w1, n->w3, n->w2, n->b1, n->b3, n->b2}, n->w13, n->b13};
    const pool_names shared = {{n->shared_w1, n->shared_w3, n->shared_w2, NULL, NULL, NULL},
                               NULL,
                               NULL};
    if (n->weight_layout != MOE_WEIGHT_OUT_IN && n->weight_layout != MOE_WEIGHT_IN_OUT)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "names.weight_layout is %d", (int)n->weight_layout);
    if (n->glu_order < MOE_GLU_GATE_UP || n->glu_order > MOE_GLU_INTERLEAVED)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "names.glu_order is %d", (int)n->glu_order);
    moe__io_model known = *m;
    for (int64_t i = 0; i < l->count; i++)
        if (l->parameter[i].owner == IO_ROUTED)
            known.experts = moe__max(known.experts, l->parameter[i].begin + l->parameter[i].all);
    MOE_TRY(plan_others(plan, &known, l, function));
    for (int32_t part = 0; part < MOE_MAX_PARTS; part++)
        MOE_TRY(plan_pool(plan, &known, l, IO_ROUTED, part, &routed, function));
    for (int32_t part = 0; part < MOE_MAX_PARTS; part++)
        MOE_TRY(plan_pool(plan, &known, l, IO_SHARED, part, &shared, function));
    return MOE_OK;
}
