# emulation.mk - CUDA without a GPU: the fake libraries, the kernels compiled for the CPU, their tests.
#
# $(EMU)/lib/libcudart.so.13, libcublas.so.13 and libnccl.so.2 are compiled once, without sanitizers, and serve every
# flavour: plain, asan (with UBSan), tsan, and traffic, which counts what kernels read and write. A
# flavour's objects of cuda/ and the tests' programs are in $(EMU)/<flavour>.

CUDA ?= /usr/local/cuda
CUDA_INCLUDE ?= $(CUDA)/include
EMU := $(BUILD)/emulation
EMU_FLAVOURS := plain asan tsan traffic
EMU_LIBS := $(EMU)/lib/libcudart.so.13 $(EMU)/lib/libcublas.so.13
# Beside them where there is nccl.h: libnccl.so.2, and in nccl_218 one that lacks what came after 2.18.
EMU_NCCL := $(if $(wildcard $(CUDA_INCLUDE)/nccl.h),$(EMU)/lib/libnccl.so.2 $(EMU)/lib/nccl_218/libnccl.so.2)
EMU_WARN := -Wall -Wextra -Wshadow $(if $(filter 1,$(WERROR)),-Werror)
EMU_INCLUDE := -isystem $(CUDA_INCLUDE) -Itests/emulation -Icuda -Isrc -Iinclude -Itests
EMU_FAKE := -std=c11 -g -O2 -fPIC -pthread -D_GNU_SOURCE $(EMU_WARN) $(EMU_INCLUDE) \
    -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-strict-aliasing

EMU_SAN_plain :=
EMU_SAN_asan := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
EMU_SAN_tsan := -fsanitize=thread -fno-omit-frame-pointer
# The instrumentation of ThreadSanitizer with our own functions behind it; it links without.
EMU_SAN_traffic := -fsanitize=thread

# Kernels and what launches them; host code in C. Identical functions stay two, for names.
EMU_KERNEL_FLAGS = -std=c++17 -x c++ -g -O1 -fPIC -pthread -DMOE_EMULATION -fno-exceptions -fno-rtti \
    -fno-strict-aliasing -fno-ipa-icf $(MATH) $(EMU_WARN) $(EMU_INCLUDE)
EMU_HOST_FLAGS = -std=c11 -g -O1 -fPIC -pthread -D_GNU_SOURCE $(EMU_WARN) $(EMU_INCLUDE)

EMU_FAKE_CUDART := fiber kernel shared random memory errors registry recorder stream progress graph launch \
    api_memory api_stream api_device traffic
EMU_FAKE_CUBLAS := cublas cublas_product
EMU_FAKE_NCCL := nccl_board nccl_comm nccl_init nccl_job nccl_call nccl_group nccl_match nccl_operation \
    nccl_memory nccl_reduce nccl_fault

$(EMU)/fake/%.o: tests/emulation/%.c
	@mkdir -p $(@D)
	$(CC) $(EMU_FAKE) $(EMU_FAKE_FLAGS) -MMD -MP -c $< -o $@
$(EMU)/fake/cublas_product.o: EMU_FAKE_FLAGS := -O3

$(EMU)/lib/libcudart.so.13: $(EMU_FAKE_CUDART:%=$(EMU)/fake/%.o) tests/emulation/libcudart.map
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,libcudart.so.13 -Wl,--version-script=tests/emulation/libcudart.map \
	    -o $@ $(filter %.o,$^) -ldl -pthread
	ln -sf libcudart.so.13 $(@D)/libcudart.so
$(EMU)/lib/libcublas.so.13: $(EMU_FAKE_CUBLAS:%=$(EMU)/fake/%.o) tests/emulation/libcublas.map \
    $(EMU)/lib/libcudart.so.13
	$(CC) -shared -Wl,-soname,libcublas.so.13 -Wl,--version-script=tests/emulation/libcublas.map \
	    -o $@ $(filter %.o,$^) -L$(@D) -lcudart -lm
	ln -sf libcublas.so.13 $(@D)/libcublas.so
$(EMU)/fake/nccl_218/%.o: tests/emulation/%.c
	@mkdir -p $(@D)
	$(CC) $(EMU_FAKE) -DEMU_NCCL_218 -MMD -MP -c $< -o $@
$(EMU)/lib/libnccl.so.2: $(EMU_FAKE_NCCL:%=$(EMU)/fake/%.o)
$(EMU)/lib/nccl_218/libnccl.so.2: $(EMU_FAKE_NCCL:%=$(EMU)/fake/nccl_218/%.o)
$(EMU)/lib/libnccl.so.2 $(EMU)/lib/nccl_218/libnccl.so.2: tests/emulation/libnccl.map $(EMU)/lib/libcudart.so.13
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,libnccl.so.2 -Wl,--version-script=tests/emulation/libnccl.map \
	    -o $@ $(filter %.o,$^) -L$(EMU)/lib -lcudart -pthread
	ln -sf libnccl.so.2 $(@D)/libnccl.so
-include $(wildcard $(EMU)/fake/*.d $(EMU)/fake/nccl_218/*.d)

# What a program of a flavour links: $(EMU_LINK_<flavour>).
EMU_LINK = -L$(EMU)/lib -lcublas -lcudart -Wl,-rpath,$(abspath $(EMU)/lib) -lm -pthread
EMU_LINK_plain = $(EMU_LINK)
EMU_LINK_asan = $(EMU_SAN_asan) $(EMU_LINK)
EMU_LINK_tsan = $(EMU_SAN_tsan) $(EMU_LINK)
EMU_LINK_traffic = $(EMU)/traffic/traffic_hooks.o $(EMU_LINK)

$(EMU)/traffic/traffic_hooks.o: tests/emulation/traffic_hooks.c
	@mkdir -p $(@D)
	$(CC) $(EMU_FAKE) -c $< -o $@

# Objects of cuda/ in each flavour: $(EMU_CUDA_OBJECTS_<flavour>). Host code has the sanitizer too, but
# for traffic, which counts kernels alone.
EMU_CUDA_KERNELS := $(wildcard cuda/*.cu)
EMU_CUDA_HOST := $(wildcard cuda/*.c)
define EMU_FLAVOUR
$(EMU)/$(1)/cuda/%.o: cuda/%.cu
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_KERNEL_FLAGS) $$(EMU_SAN_$(1)) -MMD -MP -c $$< -o $$@
$(EMU)/$(1)/cuda/%.o: cuda/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_HOST_FLAGS) $$(if $$(filter traffic,$(1)),,$$(EMU_SAN_$(1))) -MMD -MP -c $$< -o $$@
EMU_CUDA_OBJECTS_$(1) := $$(EMU_CUDA_KERNELS:cuda/%.cu=$$(EMU)/$(1)/cuda/%.o) \
    $$(EMU_CUDA_HOST:cuda/%.c=$$(EMU)/$(1)/cuda/%.o)
-include $$(EMU_CUDA_OBJECTS_$(1):.o=.d)
endef
$(foreach f,$(EMU_FLAVOURS),$(eval $(call EMU_FLAVOUR,$(f))))

.PHONY: emulation
emulation: $(EMU_LIBS) $(EMU_NCCL)

# ---- the emulator's own tests -----------------------------------------------------------------------

define EMU_OWN_TESTS
$(EMU)/$(1)/tests/%.o: tests/emulation/%.cu
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_KERNEL_FLAGS) $$(EMU_SAN_$(1)) -MMD -MP -c $$< -o $$@
$(EMU)/$(1)/planted: tests/emulation/planted.c $(EMU)/$(1)/tests/planted.o $$(EMU_LIBS) \
    $(if $(filter traffic,$(1)),$(EMU)/traffic/traffic_hooks.o)
	$$(CC) $$(EMU_HOST_FLAGS) $$< $(EMU)/$(1)/tests/planted.o $$(EMU_LINK_$(1)) -o $$@
$(EMU)/$(1)/check_emulator: tests/emulation/check_emulator.c $(EMU)/$(1)/tests/sample.o $$(EMU_LIBS) \
    $(if $(filter traffic,$(1)),$(EMU)/traffic/traffic_hooks.o) | check-have-check
	$$(CC) $$(EMU_HOST_FLAGS) $$(CHECK_CFLAGS) $$< $(EMU)/$(1)/tests/sample.o $$(CHECK_LIBS) \
	    $$(EMU_LINK_$(1)) -o $$@
$(EMU)/$(1)/tests/%.o: tests/emulation/%.c | check-have-check
	@mkdir -p $$(@D)
	$$(CC) $$(EMU_HOST_FLAGS) $$(if $$(filter traffic,$(1)),,$$(EMU_SAN_$(1))) $$(CHECK_CFLAGS) -MMD -MP -c $$< -o $$@
$(EMU)/$(1)/check_nccl_%: $(EMU)/$(1)/tests/check_nccl_%.o $(EMU)/$(1)/tests/nccl_case.o $$(EMU_NCCL)
	$$(CC) $$(filter %.o,$$^) $$(CHECK_LIBS) -L$(EMU)/lib -lnccl $$(EMU_LINK_$(1)) -ldl -o $$@
-include $(EMU)/$(1)/tests/sample.d $(EMU)/$(1)/tests/planted.d
endef
$(foreach f,$(EMU_FLAVOURS),$(eval $(call EMU_OWN_TESTS,$(f))))

# The sample through nvcc, as the library's kernels are, and through clang++, where there are such.
NVCC ?= $(CUDA)/bin/nvcc
EMU_NVCC_FLAGS := -arch=sm_80 -std=c++17 --fmad=false -Werror all-warnings \
    -Xcompiler -Wall,-Wextra,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics
EMU_COMPILED := $(if $(wildcard $(NVCC)),$(EMU)/sample_nvcc.o) \
    $(if $(call have,clang++),$(EMU)/sample_clang.o)
$(EMU)/sample_nvcc.o: tests/emulation/sample.cu $(wildcard cuda/device*.h src/half.h src/numeric.h)
	@mkdir -p $(@D)
	$(NVCC) $(EMU_NVCC_FLAGS) -Icuda -Isrc -Itests/emulation -c $< -o $@
$(EMU)/sample_clang.o: tests/emulation/sample.cu $(wildcard cuda/device*.h src/half.h src/numeric.h)
	@mkdir -p $(@D)
	clang++ $(filter-out -fno-ipa-icf,$(EMU_KERNEL_FLAGS)) -c $< -o $@

# Ranks of the fake libnccl, as threads and processes, in the flavours that look at host code.
EMU_NCCL_SUITES := $(if $(EMU_NCCL),check_nccl_fake check_nccl_faults check_nccl_refusals check_nccl_mistakes)
EMU_NCCL_FLAVOURS := plain asan tsan
EMU_NCCL_ENV := ASAN_OPTIONS=detect_leaks=0

EMU_SEEDS ?= 1 2 3
.PHONY: check-emulator
check-emulator: $(EMU_COMPILED) $(foreach f,$(EMU_FLAVOURS),$(EMU)/$(f)/planted $(EMU)/$(f)/check_emulator) \
    $(foreach f,$(EMU_NCCL_FLAVOURS),$(EMU_NCCL_SUITES:%=$(EMU)/$(f)/%))
	@$(RUN) $(foreach f,$(EMU_FLAVOURS),$(foreach s,$(EMU_SEEDS), \
	    "env CK_FORK=no MOE_EMULATION_SEED=$(s) $(EMU)/$(f)/check_emulator")) \
	    $(foreach f,$(EMU_NCCL_FLAVOURS),$(foreach s,$(EMU_SEEDS),$(foreach t,$(EMU_NCCL_SUITES), \
	    "env CK_FORK=no MOE_EMULATION_QUIET=1 MOE_EMULATION_SEED=$(s) $(EMU_NCCL_ENV) $(EMU)/$(f)/$(t)"))) \
	    "sh tests/emulation/check_planted.sh $(EMU)"
