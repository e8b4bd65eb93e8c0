# suites.mk - what runs on an emulated device: the layer's suites, the vectors, kernels against the CPU's
# steps, calls and traffic: make check-emulation, make cuda-traffic.
#
# Every file of a suite is compiled with tests/support/device/on_device.h before it. libmoe has its plain
# variants: its speed is not the point. A flavour's programs are in $(EMU)/<flavour>/suites and kernels.

DEVICE_SUITES := check_layer check_family check_half_layer check_branches check_gate check_gate_kinds check_experts \
    check_expert_kinds check_expert_config check_drop check_combine check_plan check_pass check_parameter check_preset check_ranks check_ranks_bounds check_ranks_calls \
    check_ranks_faults check_ranks_nodes
# Check suites and programs that count themselves; the latter take seeds.
KERNEL_SUITES := check_row_kernels check_plan_kernels check_mix_kernels check_travel_kernels
KERNEL_PROGRAMS := check_ffn_kernels check_gate_kernels check_router_gemm
CUDA_RANKS_PROGRAMS := check_cuda_ranks check_cuda_overlap check_cuda_chunks
CALL_PROGRAMS := check_calls check_cuda_context check_cuda_host check_cuda_host_calls $(CUDA_RANKS_PROGRAMS)
# Of libmoe_nccl, where there is nccl.h.
COMM_PROGRAMS := $(if $(EMU_NCCL),check_comm_nccl check_comm_nccl_faults check_comm_nccl_calls \
    check_comm_nccl_terms check_comm_nccl_layers check_comm_nccl_layer_faults check_comm_nccl_kills)
COMM_SUPPORT := comm_nccl_case comm_nccl_deadline layer_nccl_case
NCCL_SUITES := check_ranks check_ranks_bounds check_ranks_calls
NCCL_SUPPORT := crew device/device_nccl
# The version that a test changes.
LINK_check_comm_nccl_faults := -Wl,--wrap=ncclGetVersion
# Whose device threads are on.
LINK_check_comm_nccl_calls := -Wl,--wrap=cudaSetDevice
# Where there are no threads, or another libmoe.
LINK_check_comm_nccl_terms := -Wl,--wrap=pthread_create,--wrap=moe__module_version
# Where a rank dies, and who aborts.
LINK_check_comm_nccl_layer_faults := -Wl,--wrap=ncclGroupEnd,--wrap=ncclCommAbort
EMU_MOE := $(EMU)/moe/libmoe.a
EMU_SUPPORT := $(SUPPORT) $(wildcard tests/support/device/*.c)
RUNNER_SOURCES := $(wildcard tests/vector_runner/*.c)
EMU_SUITE_FLAGS = $(COMMON) -O1 $(CFLAGS) -MMD -MP -MF $@.d -MT $@ -Itests -Icuda -isystem $(CUDA_INCLUDE) \
    -include support/device/on_device.h -DMOE_SOURCE_DIR='"$(CURDIR)"' $(MATH) $(CHECK_CFLAGS)
EMU_CHECK_FLAGS = $(CHECK_CFLAGS) -Isrc/cpu -MMD -MP -MF $@.d -MT $@ $(MATH)

$(EMU_MOE): force
	@$(MAKE) -s BUILD=$(EMU)/moe/build LIB=$(EMU)/moe VARIANTS="$(PLAIN_VARIANTS)" HAVE_X86= \
	    NO_CUDA=1 NO_MPI=1 SANITIZE= $(EMU_MOE)

# $(1): the flavour. check_calls and traffic_table are programs of the layer's calls alone.
define EMU_SUITES
$(EMU)/$(1)/suites/%.o: tests/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_SUITE_FLAGS) $$(EMU_SAN_$(1)) -c $$< -o $$@
$(EMU)/$(1)/suites/support/device/on_device.o $(EMU)/$(1)/suites/support/device/device_world.o: \
    EMU_SUITE_FLAGS += -DMOE_TEST_ON_DEVICE_C
EMU_SUPPORT_$(1) := $$(EMU_SUPPORT:tests/%.c=$(EMU)/$(1)/suites/%.o)
EMU_LINKED_$(1) := $$(EMU_CUDA_OBJECTS_$(1)) $(EMU_MOE) $(EMU_LIBS)
.SECONDARY: $$(EMU_SUPPORT_$(1)) $$(EMU_CUDA_OBJECTS_$(1)) $$(DEVICE_SUITES:%=$(EMU)/$(1)/suites/%.o) \
    $$(patsubst %,$(EMU)/$(1)/kernels/%.o,$$(KERNEL_SUITES) $$(KERNEL_PROGRAMS) $(CALL_PROGRAMS) cuda_host cuda_ranks_case \
    $(COMM_PROGRAMS) $(COMM_SUPPORT) traffic_table) $$(EMU_NCCL_OBJECTS_$(1))
$(EMU)/$(1)/suites/check_%: $(EMU)/$(1)/suites/check_%.o $$(EMU_SUPPORT_$(1)) $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(CHECK_LIBS) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/suites/run_vectors: $$(RUNNER_SOURCES:tests/%.c=$(EMU)/$(1)/suites/%.o) \
    $(EMU)/$(1)/suites/support/device/on_device.o $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@

# Programs that stand in for the host code of cuda/ where they do not need it.
$(EMU)/$(1)/kernels/%.o: tests/emulation/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_HOST_FLAGS) $$(EMU_CHECK_FLAGS) $$(EMU_SAN_$(1)) -c $$< -o $$@
$(EMU)/$(1)/kernels/%.o: tests/emulation/%.cpp
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_KERNEL_FLAGS) $$(EMU_SAN_$(1)) -MMD -MP -MF $$@.d -MT $$@ -c $$< -o $$@
EMU_KERNELS_$(1) := $$(EMU_CUDA_KERNELS:cuda/%.cu=$(EMU)/$(1)/cuda/%.o)
$(EMU)/$(1)/kernels/check_%: $(EMU)/$(1)/kernels/check_%.o $$(EMU_KERNELS_$(1)) $(EMU_MOE) $(EMU_LIBS)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(CHECK_LIBS) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/check_gate_kernels: $(EMU)/$(1)/kernels/check_gate_kernels.o \
    $$(filter-out %/dispatch.o %/rows.o,$$(EMU_KERNELS_$(1))) $(EMU_MOE) $(EMU_LIBS)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/check_ffn_kernels: $(EMU)/$(1)/kernels/check_ffn_kernels.o $(EMU)/$(1)/kernels/ffn_case.o \
    $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/check_cuda_context: $(EMU)/$(1)/kernels/check_cuda_context.o $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/check_cuda_host $(EMU)/$(1)/kernels/check_cuda_host_calls: $(EMU)/$(1)/kernels/%: \
    $(EMU)/$(1)/kernels/%.o $(EMU)/$(1)/kernels/cuda_host.o $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/comm_nccl_deadline.o: EMU_CHECK_FLAGS += -iquote src
# Groups over NCCL.
$(EMU)/$(1)/comm/%.o: src/comm/%.c
	@mkdir -p $$(@D)
	$$(CC) -Isrc $$(EMU_HOST_FLAGS) $$(EMU_SAN_$(1)) -MMD -MP -c $$< -o $$@
EMU_NCCL_OBJECTS_$(1) := $$(patsubst src/comm/%.c,$(EMU)/$(1)/comm/%.o,$$(wildcard src/comm/nccl*.c))
# Suites of ranks over NCCL: what makes their groups is compiled again.
$(EMU)/$(1)/suites/nccl/%.o: tests/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_SUITE_FLAGS) -DMOE_TEST_NCCL $$(EMU_SAN_$(1)) -c $$< -o $$@
$(NCCL_SUITES:%=$(EMU)/$(1)/suites/%_nccl): $(EMU)/$(1)/suites/%_nccl: $(EMU)/$(1)/suites/nccl/%.o \
    $(NCCL_SUPPORT:%=$(EMU)/$(1)/suites/nccl/support/%.o) \
    $$(filter-out $(NCCL_SUPPORT:%=$(EMU)/$(1)/suites/support/%.o),$$(EMU_SUPPORT_$(1))) \
    $$(EMU_NCCL_OBJECTS_$(1)) $$(EMU_LINKED_$(1)) $(EMU_NCCL)
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(CHECK_LIBS) -L$(EMU)/lib -lnccl $$(EMU_LINK_$(1)) -ldl -o $$@
$(COMM_PROGRAMS:%=$(EMU)/$(1)/kernels/%): $(EMU)/$(1)/kernels/%: \
    $(EMU)/$(1)/kernels/%.o $(COMM_SUPPORT:%=$(EMU)/$(1)/kernels/%.o) $(EMU)/$(1)/tests/nccl_case.o \
    $$(EMU_NCCL_OBJECTS_$(1)) $$(EMU_LINKED_$(1)) $(EMU_NCCL)
	$$(CC) $$(LINK_$$(@F)) $$(filter %.o,$$^) $(EMU_MOE) $$(CHECK_LIBS) -L$(EMU)/lib -lnccl \
	    $$(EMU_LINK_$(1)) -ldl -o $$@
-include $$(EMU_NCCL_OBJECTS_$(1):.o=.d)
$(patsubst %,$(EMU)/$(1)/kernels/%.o,$(CUDA_RANKS_PROGRAMS) cuda_ranks_case): \
    EMU_CHECK_FLAGS += $(if $(EMU_NCCL),-DEMU_NCCL)
$(CUDA_RANKS_PROGRAMS:%=$(EMU)/$(1)/kernels/%): $(EMU)/$(1)/kernels/%: \
    $(EMU)/$(1)/kernels/%.o $(EMU)/$(1)/kernels/cuda_ranks_case.o $(EMU)/$(1)/kernels/cuda_host.o \
    $(EMU)/$(1)/suites/support/device/device_world.o $(if $(EMU_NCCL),$$(EMU_NCCL_OBJECTS_$(1)) $(EMU_NCCL)) \
    $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $(if $(EMU_NCCL),-L$(EMU)/lib -lnccl) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/check_calls: $(EMU)/$(1)/kernels/check_calls.o $$(EMU_LINKED_$(1))
	$$(CC) $$(filter %.o,$$^) $(EMU_MOE) $$(CHECK_LIBS) $$(EMU_LINK_$(1)) -ldl -o $$@
$(EMU)/$(1)/kernels/traffic_table: $(EMU)/$(1)/kernels/traffic_table.o $$(EMU_LINKED_$(1)) \
    $(if $(filter traffic,$(1)),$(EMU)/traffic/traffic_hooks.o)
	$$(CC) $$(filter-out %traffic_hooks.o,$$(filter %.o,$$^)) $(EMU_MOE) $$(EMU_LINK_$(1)) -ldl -o $$@
-include $$(wildcard $(EMU)/$(1)/suites/*.d $(EMU)/$(1)/suites/*/*.d $(EMU)/$(1)/suites/*/*/*.d \
    $(EMU)/$(1)/kernels/*.d)
endef
$(foreach f,$(EMU_FLAVOURS),$(eval $(call EMU_SUITES,$(f))))

# ---- check-emulation ----------------------------------------------------------------------------------

# Everything in the plain flavour; under AddressSanitizer the layer's suite with few random cases, and under it and
# ThreadSanitizer the vectors and the kernels' tests but for the large ones. A program that prints no count fails.
EMU_SEED ?= 1
EMU_JOBS ?= 2
EMU_LAUNCHED := $(abspath $(EMU))/launched.txt
EMU_SANITIZED := asan tsan
EMU_PROGRAMS_plain := $(DEVICE_SUITES:%=$(EMU)/plain/suites/%) $(EMU)/plain/suites/run_vectors \
    $(KERNEL_SUITES:%=$(EMU)/plain/kernels/%) $(KERNEL_PROGRAMS:%=$(EMU)/plain/kernels/%) \
    $(CALL_PROGRAMS:%=$(EMU)/plain/kernels/%) $(EMU_NCCL_SUITES:%=$(EMU)/plain/%)
EMU_PROGRAMS_SANITIZED := $(EMU)/asan/suites/check_layer $(foreach f,$(EMU_SANITIZED),$(EMU)/$(f)/suites/run_vectors \
    $(KERNEL_SUITES:%=$(EMU)/$(f)/kernels/%) $(KERNEL_PROGRAMS:%=$(EMU)/$(f)/kernels/%) \
    $(patsubst %,$(EMU)/$(f)/kernels/%,$(firstword $(COMM_PROGRAMS))) $(EMU_NCCL_SUITES:%=$(EMU)/$(f)/%))
EMU_ENV = env CK_FORK=no MOE_EMULATION_SEED=$(EMU_SEED) MOE_EMULATION_KERNELS=$(EMU_LAUNCHED) MOE_EMULATION_QUIET=1
# Arrays of the host in a case of the Check suites below are not freed: no leak is looked for there.
# $(1) flavour, $(2) random cases of a Check suite, $(3) jobs of the others, $(4) more of the environment
EMU_KERNEL_RUNS = $(foreach k,$(KERNEL_SUITES),"$(EMU_ENV) $(4) MOE_TEST_CASES=$(2) $(EMU)/$(1)/kernels/$(k)") \
    $(foreach k,$(KERNEL_PROGRAMS),"$(EMU_ENV) $(4) $(EMU)/$(1)/kernels/$(k) $(EMU_SEED) $(3)")
# $(1) flavour, $(2) programs, $(3) more of the environment. Deadlines that pass are not for a slow flavour.
EMU_COMM_RUNS = $(foreach c,$(2),"$(EMU_ENV) $(if $(3),$(3) )$(EMU)/$(1)/kernels/$(c)")
EMU_NCCL_RUNS = $(foreach t,$(EMU_NCCL_SUITES),"$(EMU_ENV) $(EMU_NCCL_ENV) $(EMU)/$(1)/$(t)")
EMU_AFTER = AFTER='sh tests/emulation/kernels_launched.sh $(EMU_LAUNCHED) $(EMU_KERNELS_plain)'
.PHONY: check-emulation check-emulation-plain
check-emulation: $(EMU_PROGRAMS_plain) $(EMU_PROGRAMS_SANITIZED)
	@rm -f $(EMU_LAUNCHED); echo "seed $(EMU_SEED) (EMU_SEED=)"
	@$(EMU_AFTER) sh tests/emulation/run_counted.sh $(EMU_JOBS) $(foreach s,$(DEVICE_SUITES),"$(EMU_ENV) $(EMU)/plain/suites/$(s)") \
	    "$(EMU_ENV) $(EMU)/plain/suites/run_vectors --dtype f32 tests/vectors" $(call EMU_KERNEL_RUNS,plain,12,500) \
	    $(foreach c,$(CALL_PROGRAMS),"$(EMU_ENV) MOE_EMULATION_PROTECT=1 $(EMU)/plain/kernels/$(c)") \
	    $(call EMU_NCCL_RUNS,plain) \
	    $(foreach f,$(EMU_SANITIZED),$(call EMU_COMM_RUNS,$(f),$(firstword $(COMM_PROGRAMS)))) \
	    "$(EMU_ENV) MOE_FEW=1 $(EMU)/asan/suites/check_layer" $(foreach f,$(EMU_SANITIZED), \
	        "$(EMU_ENV) $(EMU)/$(f)/suites/run_vectors --dtype f32 tests/vectors" \
	        $(call EMU_KERNEL_RUNS,$(f),2,30,CK_EXCLUDE_TAGS=large ASAN_OPTIONS=detect_leaks=0) \
	        $(call EMU_NCCL_RUNS,$(f)))
check-emulation-plain: $(EMU_PROGRAMS_plain)
	@rm -f $(EMU_LAUNCHED); echo "seed $(EMU_SEED) (EMU_SEED=)"
	@$(EMU_AFTER) sh tests/emulation/run_counted.sh $(EMU_JOBS) $(foreach s,$(DEVICE_SUITES),"$(EMU_ENV) $(EMU)/plain/suites/$(s)") \
	    "$(EMU_ENV) $(EMU)/plain/suites/run_vectors --dtype f32 tests/vectors" $(call EMU_KERNEL_RUNS,plain,12,500) \
	    $(foreach c,$(CALL_PROGRAMS),"$(EMU_ENV) $(EMU)/plain/kernels/$(c)") $(call EMU_NCCL_RUNS,plain)

# ---- check-nccl -----------------------------------------------------------------------------------------

# libmoe_nccl and layers over the fake NCCL, and the old one: on two ranks, or NCCL_RANKS, and a part of the
# calls that fail; check-nccl-long on more ranks, every call of a step that fails, a part under AddressSanitizer.
# They wait for deadlines more than they compute.
NCCL_RANKS ?= 2
NCCL_JOBS ?= 4
NCCL_TESTED_SUITES := $(if $(EMU_NCCL),$(NCCL_SUITES:%=%_nccl))
NCCL_ASAN := $(if $(EMU_NCCL),check_comm_nccl_layers check_comm_nccl_layer_faults check_comm_nccl_kills)
NCCL_PROGRAMS := $(NCCL_TESTED_SUITES:%=$(EMU)/plain/suites/%) $(COMM_PROGRAMS:%=$(EMU)/plain/kernels/%)
NCCL_OLD = LD_LIBRARY_PATH=$(abspath $(EMU)/lib/nccl_218)
# $(1) the environment
NCCL_RUNS = $(foreach t,$(NCCL_TESTED_SUITES),"$(EMU_ENV) $(1) $(EMU)/plain/suites/$(t)") \
    $(call EMU_COMM_RUNS,plain,$(COMM_PROGRAMS),$(1)) \
    $(call EMU_COMM_RUNS,plain,$(filter-out %faults %kills,$(COMM_PROGRAMS)),$(1) $(NCCL_OLD))
.PHONY: check-nccl check-nccl-long
ifneq ($(EMU_NCCL),)
check-nccl: $(NCCL_PROGRAMS)
	@sh tests/emulation/run_counted.sh $(NCCL_JOBS) $(call NCCL_RUNS,MOE_TEST_RANKS=$(NCCL_RANKS))
check-nccl-long: $(NCCL_PROGRAMS) $(NCCL_ASAN:%=$(EMU)/asan/kernels/%)
	@sh tests/emulation/run_counted.sh $(NCCL_JOBS) $(call NCCL_RUNS,MOE_TEST_RANKS=1$(comma)3$(comma)4$(comma)8 MOE_LONG=1) \
	    $(call EMU_COMM_RUNS,asan,$(NCCL_ASAN),MOE_TEST_RANKS=2)
else
check-nccl check-nccl-long:
	@echo '$@: no nccl.h in $(CUDA_INCLUDE); nothing was run'
endif

# Bytes that kernels move, over what they must.
.PHONY: cuda-traffic
cuda-traffic: $(EMU)/traffic/kernels/traffic_table
	@$(EMU)/traffic/kernels/traffic_table
