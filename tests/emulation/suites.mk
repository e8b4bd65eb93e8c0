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

# ---- contexts, and the experts' kernels ---------------------------------------------------------------

define EMU_EXPERTS
$(EMU)/$(1)/tests/%.o: tests/emulation/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_HOST_FLAGS) $$(EMU_SAN_$(1)) -MMD -MP -c $$< -o $$@
$(EMU)/$(1)/check_cuda_context: $(EMU)/$(1)/tests/check_cuda_context.o $$(EMU_CUDA_OBJECTS_$(1)) $(EMU_MOE) $(EMU_LIBS)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -o $$@
$(EMU)/$(1)/check_cuda_host $(EMU)/$(1)/check_cuda_host_calls: $(EMU)/$(1)/%: $(EMU)/$(1)/tests/%.o \
    $(EMU)/$(1)/tests/cuda_host.o $$(EMU_CUDA_OBJECTS_$(1)) $(EMU_MOE) $(EMU_LIBS)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -o $$@
$(EMU)/$(1)/check_ffn_kernels: $(EMU)/$(1)/tests/check_ffn_kernels.o $(EMU)/$(1)/tests/ffn_case.o \
    $$(EMU_CUDA_OBJECTS_$(1)) $(EMU_MOE) $(EMU_LIBS)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -o $$@
-include $(EMU)/$(1)/tests/check_cuda_context.d $(wildcard $(EMU)/$(1)/tests/*cuda_host*.d) $(EMU)/$(1)/tests/check_ffn_kernels.d $(EMU)/$(1)/tests/ffn_case.d
endef
EMU_EXPERTS_FLAVOURS := plain asan tsan
$(foreach f,$(EMU_EXPERTS_FLAVOURS),$(eval $(call EMU_EXPERTS,$(f))))

.PHONY: check-emulation-experts
check-emulation-experts: $(foreach f,$(EMU_EXPERTS_FLAVOURS),$(EMU)/$(f)/check_cuda_context $(EMU)/$(f)/check_cuda_host \
    $(EMU)/$(f)/check_cuda_host_calls $(EMU)/$(f)/check_ffn_kernels)
	@$(RUN) $(foreach f,$(EMU_EXPERTS_FLAVOURS),$(EMU)/$(f)/check_cuda_context $(EMU)/$(f)/check_cuda_host $(EMU)/$(f)/check_cuda_host_calls) "$(EMU)/plain/check_ffn_kernels 1 2000" \
	    "$(EMU)/asan/check_ffn_kernels 1 500" "$(EMU)/tsan/check_ffn_kernels 1 100"
