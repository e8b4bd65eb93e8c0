# cuda.mk - what runs on a GPU: the layer's suites, compute-sanitizer, the benchmark; and what users touch
# (examples, Python, benchmark) in emulation.
#
# Without a GPU check-cuda and bench-cuda say so and succeed; GPU_REQUIRED=1 makes that a failure.

GPU_REQUIRED ?=
GPU_DIR := $(BUILD)/gpu
GPU_LINK = $(LIB)/libmoe_cuda.a $(LIB)/libmoe.a -L$(CUDA_LIB) -lcublas -lcudart -Wl,-rpath,$(CUDA_LIB) -lm -ldl -pthread
GPU_FLAGS = $(COMMON) -O1 $(CFLAGS) -MMD -MP -MF $@.d -MT $@ -Itests -isystem $(CUDA_INCLUDE) \
    -include support/device/on_device.h -DMOE_SOURCE_DIR='"$(CURDIR)"'

# ---- suites on the device -----------------------------------------------------------------------------

# As in emulation: every file of a suite has tests/support/device/on_device.h before it.
$(GPU_DIR)/%.o: tests/%.c $(FLAGS_STAMP) | check-have-check
	@mkdir -p $(@D)
	$(CC) $(GPU_FLAGS) $(MATH) $(CHECK_CFLAGS) -c $< -o $@
$(GPU_DIR)/support/device/on_device.o: GPU_FLAGS += -DMOE_TEST_ON_DEVICE_C

GPU_SUPPORT_OBJECTS := $(patsubst tests/%.c,$(GPU_DIR)/%.o,$(SUPPORT) $(wildcard tests/support/device/*.c))
GPU_RUNNER_OBJECTS := $(patsubst tests/%.c,$(GPU_DIR)/%.o,$(wildcard tests/vector_runner/*.c)) \
    $(GPU_DIR)/support/device/on_device.o
.SECONDARY: $(GPU_SUPPORT_OBJECTS) $(GPU_RUNNER_OBJECTS)
$(GPU_DIR)/check_%: $(GPU_DIR)/check_%.o $(GPU_SUPPORT_OBJECTS) $(LIB)/libmoe_cuda.a $(LIB)/libmoe.a
	$(CC) $(filter %.o,$^) $(CHECK_LIBS) $(GPU_LINK) -o $@
$(GPU_DIR)/run_vectors: $(GPU_RUNNER_OBJECTS) $(LIB)/libmoe_cuda.a $(LIB)/libmoe.a
	$(CC) $(filter %.o,$^) $(GPU_LINK) -o $@
-include $(wildcard $(GPU_DIR)/*.d $(GPU_DIR)/*/*.d $(GPU_DIR)/support/device/*.d)

# Prints what GPU there is, or why there is none and fails.
$(GPU_DIR)/device_here: tests/cuda/device_here.c
	@mkdir -p $(@D)
	$(CC) -std=c11 -O1 -Wall -Wextra -isystem $(CUDA_INCLUDE) $< -L$(CUDA_LIB) -lcudart -Wl,-rpath,$(CUDA_LIB) -o $@
NO_GPU = { echo '$@: no GPU here; nothing was run'; test -z '$(GPU_REQUIRED)'; }
IF_GPU = $(if $(HAVE_CUDA),if ! $(GPU_DIR)/device_here; then $(NO_GPU); else,echo '$@: $(NO_CUDA_REASON)'; $(NO_GPU); if false; then)

GPU_SUITES := $(DEVICE_SUITES:%=$(GPU_DIR)/%)
GPU_TESTED := $(if $(HAVE_CUDA),$(GPU_DIR)/device_here $(GPU_SUITES) $(GPU_DIR)/run_vectors $(BUILD)/examples/13_cuda) \
    $(if $(HAVE_NCCL),$(BUILD)/examples/14_nccl)
.PHONY: check-cuda check-cuda-sanitizer bench-cuda check-cuda-users
# A process that has a context of CUDA cannot be forked: no test has one of its own. The example of NCCL may find
# one GPU only.
check-cuda: $(GPU_TESTED)
	@$(IF_GPU) CK_FORK=no $(RUN_ALONE) $(GPU_SUITES) "$(GPU_DIR)/run_vectors tests/vectors" \
	    "sh tests/cuda/check_example.sh $(BUILD)/examples/13_cuda" \
	    $(if $(HAVE_NCCL),"sh tests/cuda/check_example.sh $(BUILD)/examples/14_nccl 'no 2 GPUs here'"); fi

# memcheck finds bad addresses and leaks, racecheck races in shared memory, initcheck reads of what was never
# written, synccheck barriers that not all reach. SANITIZERS= chooses, SANITIZED= the programs.
SANITIZERS ?= memcheck racecheck initcheck synccheck
SANITIZED ?= $(GPU_SUITES) "$(GPU_DIR)/run_vectors tests/vectors"
SANITIZER := $(CUDA)/bin/compute-sanitizer
SANITIZER_FLAGS_memcheck := --leak-check full
check-cuda-sanitizer: $(GPU_TESTED)
	@$(IF_GPU) CK_FORK=no $(RUN_ALONE) $(foreach t,$(SANITIZERS),$(foreach p,$(SANITIZED), \
	    "$(SANITIZER) --tool $(t) $(SANITIZER_FLAGS_$(t)) --error-exitcode 9 $(subst ",,$(p))")); fi

# ---- the benchmark ------------------------------------------------------------------------------------

BENCH_CUDA_SOURCES := tests/bench/cuda.c tests/bench/cuda_profile.c
BENCH_CUDA_WRAP := -Wl,--wrap=cudaLaunchKernel,--wrap=cublasGemmEx,--wrap=cublasGemmStridedBatchedEx \
    -Wl,--wrap=cublasGemmGroupedBatchedEx
$(BUILD)/bench_cuda: $(BENCH_CUDA_SOURCES) tests/bench/cuda.h $(LIB)/libmoe_cuda.a $(LIB)/libmoe.a
	@mkdir -p $(@D)
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -O2 -isystem $(CUDA_INCLUDE) $(BENCH_CUDA_SOURCES) $(BENCH_CUDA_WRAP) $(GPU_LINK) -o $@
BENCH_CUDA_ARGS = $(if $(SHAPES),shape=$(SHAPES)) $(if $(DTYPES),dtype=$(DTYPES)) $(if $(TOKENS),tokens=$(TOKENS)) \
    $(if $(ROUNDS),rounds=$(ROUNDS)) $(if $(MODE),mode=$(MODE)) $(if $(KERNELS),kernels=$(KERNELS))
bench-cuda: $(if $(HAVE_CUDA),$(BUILD)/bench_cuda $(GPU_DIR)/device_here)
	@$(IF_GPU) $(BUILD)/bench_cuda $(BENCH_CUDA_ARGS); fi

# ---- the examples -------------------------------------------------------------------------------------

$(BUILD)/examples/13_cuda: examples/13_cuda.c $(LIB)/libmoe_cuda.so
	@mkdir -p $(@D)
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -isystem $(CUDA_INCLUDE) $< -L$(LIB) -lmoe_cuda -lmoe -L$(CUDA_LIB) -lcudart \
	    $(RPATH) -Wl,-rpath,$(CUDA_LIB) -lm -o $@
$(BUILD)/examples/14_nccl: examples/14_nccl.c $(LIB)/libmoe_nccl.so
	@mkdir -p $(@D)
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -isystem $(NCCL_INCLUDE) -isystem $(CUDA_INCLUDE) $< -L$(LIB) -lmoe_nccl -lmoe_cuda \
	    -lmoe -L$(NCCL_LIB) -lnccl -L$(CUDA_LIB) -lcudart $(RPATH) -Wl,-rpath,$(CUDA_LIB) -Wl,-rpath,$(NCCL_LIB) -lm -o $@

# ---- in emulation -------------------------------------------------------------------------------------

# Examples, Python and benchmark with the fake libraries. Python takes a shared library.
EMU_USER := $(EMU)/users
EMU_USER_RPATH = -Wl,-rpath,$(abspath $(EMU_USER)) -Wl,-rpath,$(abspath $(EMU)/lib) $(RPATH)
$(EMU_USER)/libmoe_cuda.so: $(EMU_CUDA_OBJECTS_plain) $(EMU_LIBS) $(LIB)/libmoe.so cuda/libmoe_cuda.map
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,$(CUDA_SONAME) -Wl,--version-script=cuda/libmoe_cuda.map -Wl,-z,defs -o $@ \
	    $(EMU_CUDA_OBJECTS_plain) -L$(LIB) -lmoe $(EMU_LINK) $(RPATH)
	ln -sf libmoe_cuda.so $(@D)/$(CUDA_SONAME)
$(EMU_USER)/13_cuda: examples/13_cuda.c $(EMU_USER)/libmoe_cuda.so
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -isystem $(CUDA_INCLUDE) $< -L$(EMU_USER) -lmoe_cuda -L$(LIB) -lmoe -L$(EMU)/lib \
	    -lcudart $(EMU_USER_RPATH) -lm -o $@
$(EMU_USER)/bench_cuda: $(BENCH_CUDA_SOURCES) tests/bench/cuda.h $(EMU_CUDA_OBJECTS_plain) $(LIB)/libmoe.a $(EMU_LIBS)
	@mkdir -p $(@D)
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -O2 -isystem $(CUDA_INCLUDE) $(BENCH_CUDA_SOURCES) $(BENCH_CUDA_WRAP) \
	    $(EMU_CUDA_OBJECTS_plain) $(LIB)/libmoe.a $(EMU_LINK) -ldl -o $@

# The demo on the host, on a GPU and on several, with little held-out text to measure on.
EMU_DEMO_FLAGS = $(DEMO_FLAGS) -DDEMO_TOKENS=32 -DDEMO_HELD=1 -isystem $(CUDA_INCLUDE)
$(EMU_USER)/demo: $(DEMO) $(DEMO_HEADERS) $(EMU_MOE)
	@mkdir -p $(@D)
	$(CC) $(EMU_DEMO_FLAGS) $(DEMO) $(EMU_MOE) -lm -pthread -o $@
EMU_DEMO_CUDA := $(subst device_none,device_cuda,$(subst ranks_none,ranks_nccl,$(DEMO)))
$(EMU_USER)/demo_cuda: $(EMU_DEMO_CUDA) $(DEMO_HEADERS) $(EMU_NCCL_OBJECTS_plain) $(EMU_LINKED_plain) $(EMU_NCCL)
	@mkdir -p $(@D)
	$(CC) $(EMU_DEMO_FLAGS) $(EMU_DEMO_CUDA) $(EMU_NCCL_OBJECTS_plain) $(EMU_CUDA_OBJECTS_plain) $(EMU_MOE) \
	    -L$(EMU)/lib -lnccl $(EMU_LINK_plain) -ldl -o $@
.PHONY: check-demo-cuda
check-demo-cuda: $(if $(EMU_NCCL),$(EMU_USER)/demo $(EMU_USER)/demo_cuda)
	@$(RUN_ALONE) "sh tests/cuda/check_demo_cuda.sh $(EMU_USER)"

# libmoe_nccl against the real NCCL, the rest emulated: nothing of NCCL's is called without a GPU.
$(EMU_USER)/libmoe_nccl.so: $(EMU_NCCL_OBJECTS_plain) $(EMU_USER)/libmoe_cuda.so src/comm/libmoe_nccl.map
	$(CC) -shared -Wl,-soname,$(NCCL_SONAME) -Wl,--version-script=src/comm/libmoe_nccl.map -Wl,-z,defs -o $@ \
	    $(EMU_NCCL_OBJECTS_plain) -L$(EMU_USER) -lmoe_cuda -L$(LIB) -lmoe -L$(NCCL_LIB) -lnccl -L$(EMU)/lib -lcudart \
	    -ldl -pthread
# The same with the fake one, for Python.
$(EMU_USER)/fake/libmoe_nccl.so: $(EMU_NCCL_OBJECTS_plain) $(EMU_USER)/libmoe_cuda.so $(EMU_NCCL) src/comm/libmoe_nccl.map
	@mkdir -p $(@D)
	$(CC) -shared -Wl,-soname,$(NCCL_SONAME) -Wl,--version-script=src/comm/libmoe_nccl.map -Wl,-z,defs -o $@ \
	    $(EMU_NCCL_OBJECTS_plain) -L$(EMU_USER) -lmoe_cuda -L$(LIB) -lmoe -L$(EMU)/lib -lnccl -lcudart $(EMU_USER_RPATH) \
	    -ldl -pthread
	ln -sf libmoe_nccl.so $(@D)/$(NCCL_SONAME)
$(EMU_USER)/14_nccl: examples/14_nccl.c $(EMU_USER)/fake/libmoe_nccl.so
	$(CC) -std=c11 $(EXAMPLE_FLAGS) -isystem $(CUDA_INCLUDE) $< -L$(EMU_USER)/fake -lmoe_nccl -L$(EMU_USER) -lmoe_cuda \
	    -L$(LIB) -lmoe -L$(EMU)/lib -lnccl -lcudart -Wl,-rpath,$(abspath $(EMU_USER))/fake $(EMU_USER_RPATH) -lm -o $@
.PHONY: check-nccl-links
ifneq ($(wildcard $(NCCL_LIB)/libnccl.so),)
check-nccl-links: $(EMU_USER)/libmoe_nccl.so
	@$(RUN) "sh tests/cuda/check_nccl_links.sh $< $(NCCL_LIB)/libnccl.so"
else
check-nccl-links:
	@echo 'check-nccl-links: no libnccl.so (NCCL_HOME=, NCCL_LIB=)'
endif

EMU_BENCH := $(EMU_USER)/bench_cuda shape=tiny tokens=24 dtype=f32,bf16 rounds=1
check-cuda-users: $(EMU_USER)/13_cuda $(EMU_USER)/bench_cuda $(if $(EMU_NCCL),$(EMU_USER)/14_nccl)
	@$(RUN) "sh tests/cuda/check_example.sh $(EMU_USER)/13_cuda" "$(EMU_BENCH)" "$(EMU_BENCH) mode=padded" \
	    $(if $(EMU_NCCL),"sh tests/cuda/check_example.sh $(EMU_USER)/14_nccl") \
	    "env PYTHONPATH=examples/python MOE_CUDA_LIB=$(abspath $(EMU_USER))/libmoe_cuda.so $(PYTHON) -m pytest -q \
	        -p no:cacheprovider tests/python/test_cuda.py" \
	    $(if $(EMU_NCCL),"env PYTHONPATH=examples/python MOE_CUDA_LIB=$(abspath $(EMU_USER))/libmoe_cuda.so \
	        MOE_NCCL_LIB=$(abspath $(EMU_USER))/fake/libmoe_nccl.so $(PYTHON) -m pytest -q -p no:cacheprovider \
	        tests/python/test_nccl.py")
