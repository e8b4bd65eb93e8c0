// 07_cplusplus.cpp - the layer from C++11: owners instead of destroy calls, exceptions instead of
// statuses, vectors for memory. The wrappers are a page; take them along.
//
// Introduces: the headers as C++; nothing new of the library.

#include <moe/moe.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

// snippet: owners
// A handle that destroys itself: Owner<moe_gate, moe_gate_destroy>.
template <typename T, void (*destroy)(T *)> struct Destroyer {
    void operator()(T *object) const { destroy(object); }
};
template <typename T, void (*destroy)(T *)> using Owner = std::unique_ptr<T, Destroyer<T, destroy>>;

using Context = Owner<moe_context, moe_context_destroy>;
using Gate = Owner<moe_gate, moe_gate_destroy>;
using Experts = Owner<moe_experts, moe_experts_destroy>;
using Layer = Owner<moe_layer, moe_layer_destroy>;
using Pass = Owner<moe_pass, moe_pass_destroy>;

class Error : public std::runtime_error
{
  public:
    Error(moe_status code, const char *message) : std::runtime_error(message), status(code) {}
    moe_status status;
};

inline void check(moe_status status)
{
    if (status != MOE_OK) throw Error(status, moe_last_error());
}

// A struct with its defaults: make(moe_gate_config_init).
template <typename T> T make(moe_status (*init)(T *, size_t))
{
    T value;
    check(init(&value, sizeof value));
    return value;
}

// create<Gate>(moe_gate_create, context.get(), &config)
template <typename O, typename Create, typename... A> O create(Create function, A... arguments)
{
    typename O::pointer object = nullptr;
    check(function(&object, arguments...));
    return O(object);
}
// end snippet

// Everything a host keeps of one layer. Members die in reverse order; any order would do.
class Mixture
{
  public:
    Mixture(std::int64_t width, std::int64_t hidden, std::int64_t count, std::int64_t top_k)
        : context(create<Context>(moe_context_create, nullptr))
    {
        auto g = make(moe_gate_config_init);
        g.d_model = width, g.num_experts = count, g.top_k = top_k;
        g.switch_weight = 0.01;
        gate = create<Gate>(moe_gate_create, context.get(), &g);
        auto e = make(moe_experts_config_init);
        e.d_model = width, e.d_hidden = hidden, e.num_experts = count;
        e.activation = MOE_ACTIVATION_GELU_TANH;
        experts = create<Experts>(moe_experts_create, context.get(), &e);
        auto l = make(moe_layer_config_init);
        l.gate = gate.get(), l.experts = experts.get();
        layer = create<Layer>(moe_layer_create, &l);
        check(moe_layer_init_parameters(layer.get(), 1));
        pass = create<Pass>(moe_pass_create, layer.get(), nullptr);
    }

    // snippet: calls
    std::vector<float> forward(const std::vector<float> &x, std::int64_t tokens)
    {
        std::vector<float> y(x.size());
        auto f = make(moe_forward_args_init);
        f.tokens = tokens, f.x = x.data(), f.y = y.data();
        check(moe_layer_forward(layer.get(), pass.get(), &f)); // remembers x until the backward
        return y;
    }

    std::vector<float> backward(const std::vector<float> &dy)
    {
        std::vector<float> dx(dy.size());
        auto b = make(moe_backward_args_init);
        b.flags = MOE_BACKWARD_OVERWRITE;
        b.dy = dy.data(), b.dx = dx.data();
        check(moe_layer_backward(layer.get(), pass.get(), &b));
        return dx;
    }

    // Plain gradient descent over whatever parameters there are.
    void descend(float rate)
    {
        for (std::int64_t i = 0; i < moe_layer_parameter_count(layer.get()); i++) {
            auto p = make(moe_parameter_record_init);
            check(moe_layer_parameter(layer.get(), i, &p));
            auto data = static_cast<float *>(p.data);
            auto grad = static_cast<const float *>(p.grad);
            for (std::int64_t j = 0; j < p.element_count; j++) data[j] -= rate * grad[j];
        }
    }
    // end snippet

  private:
    Context context;
    Gate gate;
    Experts experts;
    Layer layer;
    Pass pass;
};

static std::vector<float> numbers(std::size_t count, std::uint64_t state)
{
    std::vector<float> made(count);
    for (float &number : made) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        number = static_cast<float>(state >> 40) / 8388608.0f - 1.0f;
    }
    return made;
}

// Learns to turn every token around; returns the last mean squared error over the first.
static double learn(Mixture &mixture, std::int64_t tokens, std::int64_t width)
{
    double first = 0, error = 0;
    for (int step = 0; step < 200; step++) {
        auto x = numbers(static_cast<std::size_t>(tokens * width),
                         100u + static_cast<unsigned>(step));
        auto y = mixture.forward(x, tokens), dy = y;
        error = 0;
        for (std::size_t i = 0; i < y.size(); i++) {
            float off = y[i] + x[i];
            error += static_cast<double>(off * off) / static_cast<double>(y.size());
            dy[i] = 2 * off / static_cast<float>(tokens);
        }
        if (step == 0) first = error;
        mixture.backward(dy);
        mixture.descend(0.1f);
    }
    return error / first;
}

int main()
{
    try {
        Mixture mixture(16, 32, 4, 2);
        double left = learn(mixture, 64, 16);
        std::printf("error left after 200 steps: %s\n", left < 0.1 ? "below a tenth" : "too much");
        if (!(left < 0.1)) return 1;
        try {
            Mixture impossible(16, 32, 4, 5);
        } catch (const Error &refused) { // nothing leaks: what was made before is given up
            std::printf("%s: %s\n", moe_status_name(refused.status), refused.what());
        }
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
