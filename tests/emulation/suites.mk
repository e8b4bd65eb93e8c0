# suites.mk - the layer's suites on a CUDA context, in emulation: make check-emulation.
#
# Every file of a suite is compiled with tests/support/device/on_device.h before it. libmoe has its plain
# variants: its speed is not the point.

DEVICE_SUITES := check_layer check_family
EMU_SUITE_DIR := $(EMU)/suites
EMU_MOE := $(EMU)/moe/libmoe.a
EMU_SUITE_FLAGS = $(COMMON) -O1 $(CFLAGS) -MMD -MP -MF $@.d -MT $@ -Itests -Icuda -isystem $(CUDA_INCLUDE) \
    -include support/device/on_device.h -DMOE_SOURCE_DIR='"$(CURDIR)"' $(EMU_SAN_plain)

$(EMU_MOE): force
	@$(MAKE) -s BUILD=$(EMU)/moe/build LIB=$(EMU)/moe VARIANTS="f32_plain f64_plain bf16_plain f16_plain" HAVE_X86= \
	    NO_CUDA=1 NO_MPI=1 $(EMU_MOE)

$(EMU_SUITE_DIR)/%.o: tests/%.c
	@mkdir -p $(@D)
	$(CC) $(EMU_SUITE_FLAGS) $(MATH) $(CHECK_CFLAGS) -c $< -o $@

$(EMU_SUITE_DIR)/support/device/on_device.o: EMU_SUITE_FLAGS += -DMOE_TEST_ON_DEVICE_C

EMU_SUPPORT := $(SUPPORT) $(wildcard tests/support/device/*.c)
EMU_SUPPORT_OBJECTS := $(EMU_SUPPORT:tests/%.c=$(EMU_SUITE_DIR)/%.o)
.SECONDARY: $(EMU_SUPPORT_OBJECTS)
$(EMU_SUITE_DIR)/check_%: $(EMU_SUITE_DIR)/check_%.o $(EMU_SUPPORT_OBJECTS) $(EMU_CUDA_OBJECTS_plain) $(EMU_MOE) $(EMU_LIBS)
	$(CC) $(filter %.o,$^) $(EMU_MOE) $(CHECK_LIBS) $(EMU_LINK_plain) -ldl -o $@

RUNNER_SOURCES := $(wildcard tests/vector_runner/*.c)
EMU_RUNNER := $(EMU_SUITE_DIR)/run_vectors
$(EMU_RUNNER): $(RUNNER_SOURCES:tests/%.c=$(EMU_SUITE_DIR)/%.o) $(EMU_SUITE_DIR)/support/device/on_device.o \
    $(EMU_CUDA_OBJECTS_plain) $(EMU_MOE) $(EMU_LIBS)
	$(CC) $(filter %.o,$^) $(EMU_MOE) $(EMU_LINK_plain) -ldl -o $@
