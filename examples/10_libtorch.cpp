// 10_libtorch.cpp - the layer as a custom autograd function of PyTorch's C++ interface. Parameters
// are torch tensors that the library is bound to in every call, without a copy; y and the losses
// are differentiable; several forwards may be in flight. Compared with the same equations in plain
// torch operations, output and every gradient, and trained for a few steps.
//
// Introduces: loss_grad, losses_out, a pass for each forward in flight, MOE_DTYPE_F64.
//
//     c++ -std=c++17 -Iinclude -isystem /usr/include/torch/csrc/api/include
//         examples/10_libtorch.cpp -Llib -lmoe -ltorch -ltorch_cpu -lc10

#include <moe/moe.h>
#include <torch/torch.h>

#include <cstdio>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

static void check(moe_status status)
{
    if (status != MOE_OK) throw std::runtime_error(moe_last_error());
}

// What a layer is made of; the layer holds references of its own.
struct Handles {
    moe_context *context = nullptr;
    moe_gate *gate = nullptr;
    moe_experts *experts = nullptr;
    ~Handles()
    {
        moe_experts_destroy(experts), moe_gate_destroy(gate), moe_context_destroy(context);
    }
};

// The library's side: a gate that sees x, SwiGLU experts, the Switch loss; nothing owned.
struct Mixture {
    static constexpr int64_t D = 12, F = 16, E = 5, K = 2;
    moe_layer *layer = nullptr;

    Mixture()
    {
        Handles made;
        moe_context *&context = made.context;
        moe_gate *&gate = made.gate;
        moe_experts *&experts = made.experts;
        moe_gate_config g;
        moe_experts_config e;
        moe_layer_config l;
        check(moe_context_create(&context, nullptr));
        check(moe_gate_config_init(&g, sizeof g));
        g.d_model = D, g.num_experts = E, g.top_k = K, g.switch_weight = 0.1;
        g.dtype = MOE_DTYPE_F64, g.parameters = MOE_PARAMETERS_BOUND;
        check(moe_gate_create(&gate, context, &g));
        check(moe_experts_config_init(&e, sizeof e));
        e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SWIGLU;
        e.dtype = MOE_DTYPE_F64, e.parameters = MOE_PARAMETERS_BOUND;
        check(moe_experts_create(&experts, context, &e));
        check(moe_layer_config_init(&l, sizeof l));
        l.gate = gate, l.experts = experts;
        check(moe_layer_create(&layer, &l));
    }
    ~Mixture() { moe_layer_destroy(layer); }
    Mixture(const Mixture &) = delete;

    // The parameters as torch tensors, in the library's order and shapes.
    std::vector<Tensor> parameters() const
    {
        std::vector<Tensor> made;
        for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
            moe_parameter_record p;
            check(moe_parameter_record_init(&p, sizeof p));
            check(moe_layer_parameter(layer, i, &p));
            auto shape = torch::IntArrayRef(p.shape, static_cast<size_t>(p.dims));
            made.push_back((torch::randn(shape, torch::kFloat64) * 0.4).set_requires_grad(true));
        }
        return made;
    }

    // The library sees addresses; what they are the addresses of is checked here.
    void require(const Tensor &x, const tensor_list &parameters) const
    {
        TORCH_CHECK(x.dim() == 2 && x.size(1) == D, "x has sizes ", x.sizes(), "; wanted [T, ", D,
                    "]");
        TORCH_CHECK(x.scalar_type() == torch::kFloat64 && x.is_cpu(), "x is ", x.toString());
        for (size_t i = 0; i < parameters.size(); i++) {
            moe_parameter_record p;
            check(moe_parameter_record_init(&p, sizeof p));
            check(moe_layer_parameter(layer, static_cast<int64_t>(i), &p));
            const Tensor &given = parameters[i];
            auto shape = torch::IntArrayRef(p.shape, static_cast<size_t>(p.dims));
            TORCH_CHECK(given.sizes() == shape, p.name, " has sizes ", given.sizes(), "; wanted ",
                        shape);
            TORCH_CHECK(given.scalar_type() == torch::kFloat64 && given.is_cpu(), p.name, " is ",
                        given.toString());
        }
    }

    // snippet: bind
    // Where the tensors are now; an undefined gradient is not wanted.
    void bind(const tensor_list &data, const tensor_list &grads) const
    {
        for (size_t i = 0; i < data.size(); i++) {
            moe_binding b;
            check(moe_binding_init(&b, sizeof b));
            b.data_dtype = b.grad_dtype = MOE_DTYPE_F64;
            b.data = data[i].data_ptr();
            b.grad = i < grads.size() && grads[i].defined() ? grads[i].data_ptr() : nullptr;
            for (int64_t d = 0; d < data[i].dim(); d++) b.data_stride[d] = data[i].stride(d);
            check(moe_layer_bind(layer, static_cast<int64_t>(i), &b));
        }
    }
    // end snippet
};

using Shared = std::shared_ptr<const Mixture>;

// A pass lives as long as the autograd node that may ask for its backward.
struct PassHolder : torch::CustomClassHolder {
    moe_pass *pass = nullptr;
    std::shared_ptr<const Mixture> mixture;
    explicit PassHolder(std::shared_ptr<const Mixture> m) : mixture(std::move(m))
    {
        check(moe_pass_create(&pass, mixture->layer, nullptr));
    }
    ~PassHolder() override { moe_pass_destroy(pass); }
};

// snippet: function
struct MixtureFunction : torch::autograd::Function<MixtureFunction> {
    // torch sees tensors that are arguments, so the parameters are named one by one.
    static tensor_list forward(AutogradContext *ctx, Shared m, const Tensor &given,
                               const Tensor &gate, const Tensor &w1, const Tensor &w3,
                               const Tensor &w2)
    {
        tensor_list parameters = {gate, w1, w3, w2};
        m->require(given, parameters);
        Tensor x = given.contiguous(), y = torch::empty_like(x);
        Tensor losses = torch::zeros({MOE_LOSS_SLOTS}, x.options());
        auto holder = c10::make_intrusive<PassHolder>(m);
        moe_forward_args f;
        check(moe_forward_args_init(&f, sizeof f));
        f.tokens = x.size(0), f.x = x.data_ptr(), f.y = y.data_ptr();
        f.losses_out = losses.data_ptr();
        m->bind(parameters, {});
        check(moe_layer_forward(m->layer, holder->pass, &f));

        tensor_list saved = parameters;
        saved.push_back(x); // torch finds changes in place, and keeps x where it is
        ctx->save_for_backward(saved);
        ctx->saved_data["pass"] = c10::IValue::make_capsule(holder);
        return {y, losses};
    }

    static tensor_list backward(AutogradContext *ctx, tensor_list grad)
    {
        auto capsule = ctx->saved_data["pass"].toCapsule();
        auto holder = static_cast<PassHolder *>(capsule.get());
        tensor_list saved = ctx->get_saved_variables(), grads;
        Tensor x = saved.back();
        saved.pop_back();
        for (const Tensor &p : saved) // fresh memory in every step, as torch has it
            grads.push_back(torch::empty(p.sizes(), p.options()));
        Tensor dx = torch::empty_like(x), dy = grad[0].contiguous(), factor = grad[1].contiguous();

        moe_backward_args b;
        check(moe_backward_args_init(&b, sizeof b));
        b.flags = MOE_BACKWARD_OVERWRITE;
        b.dy = dy.data_ptr(), b.dx = dx.data_ptr(), b.x = x.data_ptr();
        b.loss_grad = factor.data_ptr(); // the gradient by each loss, as autograd has it
        holder->mixture->bind(saved, grads);
        check(moe_layer_backward(holder->mixture->layer, holder->pass, &b));

        tensor_list result = {Tensor(), dx};
        result.insert(result.end(), grads.begin(), grads.end());
        return result;
    }
};
// end snippet

static tensor_list mixture(const Shared &m, const Tensor &x, const tensor_list &p)
{
    return MixtureFunction::apply(m, x, p.at(0), p.at(1), p.at(2), p.at(3));
}

// The same equations: softmax over the K chosen logits; Switch loss E sum_e n_e/(T K) mean_t P_te.
static tensor_list eager(const Tensor &x, const tensor_list &p)
{
    Tensor logits = x.matmul(p[0]);
    auto [value, ids] = logits.topk(Mixture::K, 1);
    Tensor weight = torch::softmax(value, 1), y = torch::zeros_like(x);
    for (int64_t e = 0; e < Mixture::E; e++)
        for (int64_t k = 0; k < Mixture::K; k++) {
            Tensor rows = torch::nonzero(ids.select(1, k) == e).flatten(),
                   seen = x.index_select(0, rows);
            Tensor h = torch::silu(seen.matmul(p[1][e])) * seen.matmul(p[2][e]);
            Tensor out = h.matmul(p[3][e]) * weight.select(1, k).index_select(0, rows).unsqueeze(1);
            y = y.index_add(0, rows, out);
        }
    Tensor counts = torch::bincount(ids.flatten(), {}, Mixture::E).to(x.dtype());
    Tensor loss = (counts / counts.sum() * torch::softmax(logits, 1).mean(0)).sum();
    return {y, 0.1 * static_cast<double>(Mixture::E) * loss};
}

static double relative(const Tensor &a, const Tensor &b)
{
    return ((a - b).abs().max() / b.abs().max()).item<double>();
}

// How many tensors differ by more than rounding.
static int compare(const Shared &m, const tensor_list &p, const Tensor &x, const Tensor &dy,
                   bool verbose)
{
    tensor_list ours = mixture(m, x, p), theirs = eager(x, p), wanted = p;
    wanted.push_back(x);
    auto got = torch::autograd::grad({(ours[0] * dy).sum() + ours[1].sum()}, wanted);
    auto want = torch::autograd::grad({(theirs[0] * dy).sum() + theirs[1]}, wanted);
    got.insert(got.begin(), {ours[0], ours[1].sum()});
    want.insert(want.begin(), {theirs[0], theirs[1]});
    static const char *const names[] = {"y",
                                        "losses",
                                        "gradient of gate.weight",
                                        "gradient of experts.w1",
                                        "gradient of experts.w3",
                                        "gradient of experts.w2",
                                        "gradient of x"};
    int bad = 0;
    for (size_t i = 0; i < got.size(); i++) {
        double error = relative(got[i], want[i]);
        bool agrees = error < 1e-12;
        std::printf("%-24s %s\n", names[i], agrees ? "agrees" : "DIFFERS");
        if (verbose) std::printf("    largest relative error %.1e\n", error);
        bad += !agrees;
    }
    return bad;
}

// Two layers deep, over one mixture: two passes in flight.
static double train(const Shared &m, tensor_list p, const Tensor &x)
{
    torch::optim::Adam optimizer(p, torch::optim::AdamOptions(1e-2));
    double first = 0, last = 0;
    for (int step = 0; step < 60; step++) {
        optimizer.zero_grad();
        tensor_list one = mixture(m, x, p);
        tensor_list two = mixture(m, x + one[0], p);
        Tensor loss = (two[0] - x.sin()).pow(2).mean() + one[1].sum() + two[1].sum();
        loss.backward();
        optimizer.step();
        last = loss.item<double>();
        if (step == 0) first = last;
    }
    return last / first;
}

// Any argument: show the errors too.
int main(int argc, char **)
{
    try {
        torch::manual_seed(1);
        auto m = std::make_shared<const Mixture>();
        tensor_list p = m->parameters();
        Tensor x = torch::randn({40, Mixture::D}, torch::kFloat64).set_requires_grad(true);
        int bad = compare(m, p, x, torch::randn({40, Mixture::D}, torch::kFloat64), argc > 1);
        double left = train(m, p, x.detach());
        try {
            mixture(m, torch::zeros({3, 5}, torch::kFloat64), p);
        } catch (const c10::Error &refused) {
            std::printf("refused: %s\n", refused.what_without_backtrace());
        }
        std::printf("trained through two passes in flight: loss %s\n",
                    left < 0.1 ? "falls" : "DOES NOT FALL");
        return !(bad == 0 && left < 0.1);
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
