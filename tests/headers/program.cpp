// program.cpp - the headers from C++: all of them, and a call across the boundary.
#include <moe/moe.h>

#include <cstdio>

int main()
{
    moe_context *context = 0;
    moe_gate_config config;
    if (moe_context_create(&context, 0) != MOE_OK) return 1;
    if (moe_gate_config_init(&config, sizeof config) != MOE_OK) return 1;
    if (config.top_k != 1 || config.struct_size != sizeof config) return 1;
    std::printf("%s on %d threads\n", moe_version_string(), int(moe_context_threads(context)));
    moe_context_destroy(context);
    return 0;
}
