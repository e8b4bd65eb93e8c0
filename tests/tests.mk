# tests.mk - the tests. Three tiers: make check (minutes), .ci/run (tens of minutes), make check-long.

CHECK_CFLAGS = $(shell $(PKG_CONFIG) --cflags check 2>/dev/null)
CHECK_LIBS = $(shell $(PKG_CONFIG) --libs check 2>/dev/null)

SUPPORT := $(wildcard tests/reference/*.c) $(wildcard tests/support/*.c)
SUITES := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/check_*.c))
# Those of libmoe_io, where that is built.
IO_SUITES := $(filter $(BUILD)/tests/check_io%,$(SUITES))
ifeq ($(HAVE_IO),)
SUITES := $(filter-out $(IO_SUITES),$(SUITES))
endif
# The calls that check_memory counts.
LINK_memory := -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=posix_memalign,--wrap=mmap
# The call that check_gradient_report spoils.
LINK_gradient_report := -Wl,--wrap=moe_layer_backward
HOSTS := $(patsubst tests/hosts/%.c,$(BUILD)/tests/hosts/%,$(wildcard tests/hosts/*.c))
# Examples: C ones always, those of libmoe_io where that is built; C++ where there is a compiler; libtorch's
# by check-libtorch, since they take a minute to compile.
CXX ?= c++
HAVE_CXX := $(shell command -v $(CXX) >/dev/null 2>&1 && echo yes)
EXAMPLES := $(patsubst examples/%.c,$(BUILD)/examples/%,$(wildcard examples/*.c))
IO_EXAMPLES := $(patsubst examples/%.c,$(BUILD)/examples/%,$(shell grep -l 'moe/io\.h' examples/*.c))
ifeq ($(HAVE_IO),)
EXAMPLES := $(filter-out $(IO_EXAMPLES),$(EXAMPLES))
endif
# Those of GPUs are built and run by check-cuda and check-cuda-users.
CUDA_EXAMPLES := $(patsubst examples/%.c,$(BUILD)/examples/%,$(shell grep -l 'example_cuda\.h' examples/*.c))
EXAMPLES := $(filter-out $(CUDA_EXAMPLES),$(EXAMPLES))
CXX_EXAMPLES := $(filter-out %libtorch,$(patsubst examples/%.cpp,$(BUILD)/examples/%,$(wildcard examples/*.cpp)))
TORCH_EXAMPLES := $(filter %libtorch,$(patsubst examples/%.cpp,$(BUILD)/examples/%,$(wildcard examples/*.cpp)))
ifeq ($(HAVE_CXX),yes)
EXAMPLES += $(CXX_EXAMPLES)
endif
RPATH = -Wl,-rpath,$(abspath $(LIB))
TEST_FLAGS = $(COMMON) -O1 $(CFLAGS) -MMD -MP -MF $@.d -MT $@ -Itests -DMOE_SOURCE_DIR='"$(CURDIR)"' \
    $(if $(TWIN),-DMOE_TWIN)

.PHONY: check-examples check-tutorial tutorial check-libtorch check-python check-torch compare-torch check-torch-current \
    check-transformers check-mutants bench-scale bench-ranks
.PHONY: check check-have-check check-suites check-hosts check-vectors check-headers check-abi \
    check-install check-demo check-format format abi-baseline check-asan check-tsan check-valgrind check-long \
    test-programs

check-have-check:
	@$(PKG_CONFIG) --exists check 2>/dev/null || { \
	    echo 'The tests need the Check library and pkg-config: apt-get install check pkg-config'; exit 1; }

$(BUILD)/tests/support/%.o: tests/%.c $(FLAGS_STAMP) | check-have-check
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) -c $< -o $@

SUPPORT_OBJECTS := $(SUPPORT:tests/%.c=$(BUILD)/tests/support/%.o)
.SECONDARY: $(SUPPORT_OBJECTS)

$(IO_SUITES): $(LIB)/libmoe_io.a
$(IO_SUITES): MODULE_LIBS = $(LIB)/libmoe_io.a
$(IO_SUITES): CHECK_LIBS += $(JANSSON_LIBS)
# What UBSan knows of every expression is data full of addresses: a program that stays where it is linked need not
# change them at every start. gold links it in half the time.
LINK_SANITIZED := $(if $(findstring undefined,$(SANITIZE)),-no-pie $(if $(shell command -v ld.gold),-fuse-ld=gold))
# What a build with TWIN=1 has in its library.
ifeq ($(TWIN),)
$(BUILD)/tests/check_kernel_twin: $(TWIN_OBJECTS)
$(BUILD)/tests/check_kernel_twin: MODULE_LIBS = $(TWIN_OBJECTS)
endif
$(BUILD)/tests/check_%: tests/check_%.c $(SUPPORT_OBJECTS) $(LIB)/libmoe.a | check-have-check
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $(MATH) $(CHECK_CFLAGS) $(LINK_$*) $(LINK_SANITIZED) $< $(SUPPORT_OBJECTS) $(MODULE_LIBS) \
	    $(LIB)/libmoe.a $(CHECK_LIBS) -lm -ldl -o $@

$(BUILD)/tests/hosts/%: tests/hosts/%.c $(LIB)/libmoe.so
	@mkdir -p $(@D)
	$(CC) $(TEST_FLAGS) $< -L$(LIB) -lmoe $(RPATH) -lm -o $@

# As a reader would build them: public headers only.
EXAMPLE_FLAGS = -g -O1 -pthread -D_GNU_SOURCE -Iinclude -Wall -Wextra -Wpedantic -Wshadow -Wconversion \
    $(if $(filter 1,$(WERROR)),-Werror) $(SAN) $(CFLAGS) -MMD -MP -MF $@.d -MT $@
$(IO_EXAMPLES): $(LIB)/libmoe_io.so
$(IO_EXAMPLES): MODULE_LIBS = -lmoe_io
$(BUILD)/examples/%: examples/%.c $(LIB)/libmoe.so
	@mkdir -p $(@D)
	$(CC) -std=c11 $(EXAMPLE_FLAGS) $< -L$(LIB) $(MODULE_LIBS) -lmoe $(RPATH) -lm -o $@

$(CXX_EXAMPLES): $(BUILD)/examples/%: examples/%.cpp $(LIB)/libmoe.so
	@mkdir -p $(@D)
	$(CXX) -std=c++11 $(EXAMPLE_FLAGS) $< -L$(LIB) -lmoe $(RPATH) -lm -o $@

# Debian's libtorch-dev; TORCH_CFLAGS and TORCH_LIBS for another one. Its headers are not free of warnings.
TORCH_CFLAGS ?= -isystem /usr/include/torch/csrc/api/include
TORCH_LIBS ?= -ltorch -ltorch_cpu -lc10
$(TORCH_EXAMPLES): $(BUILD)/examples/%: examples/%.cpp $(LIB)/libmoe.so
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O1 -pthread -Iinclude -Wall -Wextra $(TORCH_CFLAGS) $(CFLAGS) $< -L$(LIB) -lmoe $(RPATH) \
	    $(TORCH_LIBS) -o $@

RUNNER := $(wildcard tests/vector_runner/*.c)
$(BUILD)/run_vectors: $(RUNNER) $(wildcard tests/vector_runner/*.h) $(LIB)/libmoe.so
	@mkdir -p $(@D)
	$(CC) $(filter-out -Isrc,$(COMMON)) -O1 $(CFLAGS) $(RUNNER) -L$(LIB) -lmoe $(RPATH) -lm -o $@

# Programs of several ranks, by the compiler of each MPI.
MPI_PROGRAMS := $(foreach f,$(MPIS),$(BUILD)/tests/check_mpi_$(f))
MPI_BENCHES := $(foreach f,$(MPIS),$(BUILD)/tests/bench_ranks_$(f))
define MPI_PROGRAM_RULE
$(BUILD)/tests/check_mpi_$(1): tests/ranks/check_mpi.c $(SUPPORT_OBJECTS) $(LIB)/libmoe_mpi_$(1).a $(LIB)/libmoe.a | \
    check-have-check
	@mkdir -p $$(@D)
	OMPI_CC='$$(CC)' MPICH_CC='$$(CC)' $$(MPICC_$(1)) $$(TEST_FLAGS) $$(MATH) $$(CHECK_CFLAGS) $$< $$(SUPPORT_OBJECTS) \
	    $(LIB)/libmoe_mpi_$(1).a $(LIB)/libmoe.a $$(CHECK_LIBS) -lm -ldl -o $$@
endef
$(foreach f,$(MPIS),$(eval $(call MPI_PROGRAM_RULE,$(f))))

test-programs: check-have-check $(SUITES) $(HOSTS) $(EXAMPLES) $(BUILD)/run_vectors

# Each argument of run_programs.sh is one command; it prints their closing lines and the sum. As many at once as
# there are JOBS; one after the other what has several processes, a GPU, or both.
RUN_ALONE := JOBS=1 sh tests/run_programs.sh
RUN := JOBS=$(JOBS) sh tests/run_programs.sh
VECTORS = "$(BUILD)/run_vectors tests/vectors"
SCRIPTS = "sh tests/headers/check.sh $(LIB)" "sh tests/abi/check.sh $(LIB)" \
    "sh tests/packaging/check_install.sh $(BUILD)" "sh tests/packaging/check_options.sh" \
    "sh tests/packaging/check_runs.sh"

RUN_EXAMPLES = "sh tests/packaging/check_examples.sh $(BUILD)"

check:
	+@$(AT_ONCE) host test-programs $(BUILD)/demo $(BUILD)/bench/bench
	@$(RUN) $(SUITES) $(HOSTS) $(VECTORS) $(SCRIPTS) $(RUN_EXAMPLES) "sh tests/packaging/check_tutorial.sh" \
	    "sh tests/packaging/check_demo.sh $(BUILD)" "sh tests/packaging/check_bench.sh $(BUILD)"

# The examples, which run one after the other, take longest under a sanitizer and are started first.
check-suites: test-programs
	@$(RUN) $(RUN_EXAMPLES) $(SUITES) $(HOSTS) $(VECTORS)
check-examples: $(EXAMPLES)
	@$(RUN) $(RUN_EXAMPLES)
check-tutorial:
	@$(RUN) "sh tests/packaging/check_tutorial.sh"
tutorial:
	sh tests/packaging/check_tutorial.sh --write
check-hosts: $(HOSTS)
	@$(RUN) $(HOSTS)
check-vectors: $(BUILD)/run_vectors
	$(BUILD)/run_vectors tests/vectors
check-headers: $(LIB)/libmoe.a
	@$(RUN) "sh tests/headers/check.sh $(LIB)"
check-abi: $(LIB)/libmoe.so $(LIB)/libmoe.a
	@$(RUN) "sh tests/abi/check.sh $(LIB)"
check-install: host
	@$(RUN) "sh tests/packaging/check_install.sh $(BUILD)"

# Ranks as processes: the first MPI on 2 and 3 ranks; MPI_TESTED="openmpi mpich" RANKS="2 3 4 8" for more.
MPI_TESTED ?= $(firstword $(MPIS))
RANKS ?= 2 3
.PHONY: check-mpi
check-mpi: $(MPI_PROGRAMS) $(MPI_BENCHES) $(BUILD)/demo $(MPIS:%=$(BUILD)/demo_mpi_%)
	@test -n '$(MPI_TESTED)' || { echo 'check-mpi needs an MPI: apt-get install libopenmpi-dev openmpi-bin'; exit 1; }
	@$(RUN_ALONE) $(foreach f,$(MPI_TESTED),"sh tests/ranks/check_mpi.sh $(BUILD) $(f) $(RANKS)" \
	    "MPI=$(f) sh tests/ranks/check_demo_mpi.sh $(BUILD)")

# ---- Python and PyTorch -----------------------------------------------------------------------------

# The Python that sees Debian's packages (numpy, torch, pytest).
PYTHON ?= $(shell test -x /usr/bin/python3 && echo /usr/bin/python3 || echo python3)
VENV := $(BUILD)/venv
PY_SOURCES = $(shell find examples/python -name '*.py' -o -name '*.toml' 2>/dev/null) \
    $(wildcard include/moe/*.h src/*.[ch] src/cpu/*.[ch] src/comm/*.[ch] src/io/*.[ch])
# What the package is compared with. Without it those tests are skipped.
PY_PARTNERS = safetensors $(if $(MPIS),mpi4py)

# The package as a user installs it, in an environment of its own.
$(VENV)/installed: $(PY_SOURCES)
	@mkdir -p $(BUILD)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv --system-site-packages $(VENV)
	CFLAGS='-O1 -g0 $(CFLAGS)' $(VENV)/bin/pip install -q --no-deps --force-reinstall ./examples/python
	-$(VENV)/bin/pip install -q --no-deps $(PY_PARTNERS)
	@touch $@

PYTEST = MOE_LIB='$(abspath $(LIB))' $(VENV)/bin/python -m pytest -q -p no:cacheprovider
TORCH_TESTS = $(wildcard tests/python/test_torch*.py)
check-python: $(VENV)/installed $(BUILD)/demo mpi
	$(PYTEST) $(TORCH_TESTS:%=--ignore=%) tests/python
check-torch: $(VENV)/installed
	$(PYTEST) $(TORCH_TESTS)
compare-torch: $(VENV)/installed
	$(VENV)/bin/python examples/python/compare_eager.py
check-libtorch: $(TORCH_EXAMPLES)
	@$(RUN) "sh tests/packaging/check_examples.sh $(BUILD) libtorch"

# The same with the current PyTorch of PyPI: some gigabytes.
check-torch-current:
	@mkdir -p $(BUILD)
	test -x $(BUILD)/venv-current/bin/python || $(PYTHON) -m venv $(BUILD)/venv-current
	$(BUILD)/venv-current/bin/pip install -q torch numpy pytest
	$(MAKE) VENV=$(BUILD)/venv-current check-python check-torch compare-torch

# Against the MoE blocks of transformers, of the versions in the file: some gigabytes.
TRANSFORMERS := $(BUILD)/venv-transformers
check-transformers:
	@mkdir -p $(BUILD)
	test -x $(TRANSFORMERS)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS)
	$(TRANSFORMERS)/bin/pip install -q -r tests/python/requirements-transformers.txt
	$(TRANSFORMERS)/bin/pip install -q --no-deps --force-reinstall ./examples/python
	$(TRANSFORMERS)/bin/python tests/python/compare_transformers.py

# ---- deliberate mistakes, and time and memory at scale ------------------------------------------------

# Each mistake of tests/mutants/list.txt must fail a test; sources are copied to $(BUILD)/mutants.
check-mutants: check-have-check
	python3 tests/mutants/run.py $(BUILD)

# 131,072 experts: ROWS of each, STEPS of them; wants 16 GiB.
$(BUILD)/bench_scale: tests/bench/scale.c $(LIB)/libmoe.a
	@mkdir -p $(@D)
	$(CC) $(EXAMPLE_FLAGS) -std=c11 -O2 $< $(LIB)/libmoe.a -lm -o $@
bench-scale: $(BUILD)/bench_scale
	$(BUILD)/bench_scale $(or $(ROWS),4) $(or $(STEPS),5)

# libmoe in turns with its peers; each of these is left out where its library is not found, and none is part of
# libmoe.
OPENBLAS_CFLAGS ?= $(shell $(PKG_CONFIG) --cflags openblas 2>/dev/null)
OPENBLAS_LIBS ?= $(shell $(PKG_CONFIG) --libs openblas 2>/dev/null)
ONEDNN_LIBS ?= $(shell echo 'int main(void) { return 0; }' | $(CC) -x c - -o /dev/null -ldnnl 2>/dev/null && echo -ldnnl)
BENCH_SOURCES := $(wildcard tests/bench/bench*.c)
BENCH_FLAGS = -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -DMOE_SOURCE_DIR='"$(CURDIR)"' \
    $(if $(OPENBLAS_LIBS),-DHAVE_OPENBLAS $(OPENBLAS_CFLAGS)) $(if $(ONEDNN_LIBS),-DHAVE_ONEDNN)
$(BUILD)/bench/bench: $(BENCH_SOURCES) tests/bench/bench.h $(LIB)/libmoe.a
	@mkdir -p $(@D)
	$(CC) $(EXAMPLE_FLAGS) -std=c11 $(BENCH_FLAGS) $(BENCH_SOURCES) $(LIB)/libmoe.a $(OPENBLAS_LIBS) $(ONEDNN_LIBS) \
	    -lm -ldl -o $@

# Peers in Python run where torch is: BENCH_PYTHON. Results are in $(BUILD)/bench.
BENCH_PYTHON ?= $(PYTHON)
BENCH_TABLE = PYTHONDONTWRITEBYTECODE=1 $(PYTHON) tests/bench/bench_table.py --bench $(BUILD)/bench/bench \
    --out $(BUILD)/bench --python $(BENCH_PYTHON) $(if $(THREADS),--threads $(THREADS)) $(if $(ONLY),--only $(ONLY))
.PHONY: bench bench-quick check-instructions instructions
bench: $(BUILD)/bench/bench $(BUILD)/bench_scale
	$(BENCH_TABLE) --scale $(BUILD)/bench_scale
bench-quick: $(BUILD)/bench/bench
	$(BENCH_TABLE) --quick

# Instructions of fixed shapes, by valgrind, against tests/bench/instructions.txt; `instructions` renews that.
INSTRUCTIONS = $(PYTHON) tests/bench/instructions.py --bench $(BUILD)/bench/bench --library $(LIB)/libmoe.a
check-instructions: $(BUILD)/bench/bench
	$(call NEED,valgrind,valgrind)
	@$(INSTRUCTIONS)
instructions: $(BUILD)/bench/bench
	$(call NEED,valgrind,valgrind)
	$(INSTRUCTIONS) --write

# Weak scaling: groups of RANKS ranks with TOKENS tokens and EXPERTS experts each.
define BENCH_RANKS_RULE
$(BUILD)/tests/bench_ranks_$(1): tests/bench/ranks.c tests/bench/ranks_print.c tests/bench/ranks.h \
    $(LIB)/libmoe_mpi_$(1).a $(LIB)/libmoe.a
	@mkdir -p $$(@D)
	OMPI_CC='$$(CC)' MPICH_CC='$$(CC)' $$(MPICC_$(1)) -std=c11 $$(EXAMPLE_FLAGS) -O2 \
	    $$(filter %.c %.a,$$^) -lm -o $$@
endef
$(foreach f,$(MPIS),$(eval $(call BENCH_RANKS_RULE,$(f))))
empty :=
BENCH_RANKS_ARGS = ranks=$(subst $(empty) ,$(comma),$(strip $(RANKS))) $(if $(TOKENS),tokens=$(TOKENS)) \
    $(if $(EXPERTS),experts=$(EXPERTS)) $(if $(TOPK),k=$(TOPK)) $(if $(D),d=$(D)) $(if $(F),f=$(F)) $(if $(O),o=$(O)) \
    $(if $(CHUNK),chunk=$(CHUNK)) $(if $(STEPS),steps=$(STEPS))
bench-ranks: RANKS = 1 2
bench-ranks: $(if $(MPI),$(BUILD)/tests/bench_ranks_$(MPI))
	@test -n '$(MPI)' || { echo 'bench-ranks needs an MPI: apt-get install libopenmpi-dev openmpi-bin'; exit 1; }
	$(LAUNCH) $(lastword $(shell printf '%s\n' $(RANKS) | sort -n)) $(BUILD)/tests/bench_ranks_$(MPI) $(BENCH_RANKS_ARGS)

# ---- libmoe_cuda without a GPU ------------------------------------------------------------------------

.PHONY: check-cuda-resources check-cuda-missing
# Registers, shared memory and spills of what cuda/ is compiled to.
check-cuda-resources: cuda
	CUDA='$(CUDA)' sh tests/cuda/resources.sh $(BUILD)/cuda
check-cuda-missing: cuda $(LIB)/libmoe.a
	CUDA_LIB='$(CUDA_LIB)' sh tests/cuda/check_cuda_missing.sh $(LIB)

# ---- sanitizers and valgrind ------------------------------------------------------------------------

# With a sanitizer -O3 and -g take three times as long to compile as -O1 and the lines that a report names.
SANITIZED_CFLAGS = -O1 -g1 $(CFLAGS)
# Without FMA in the instruction set a fused multiply-add is a call, which takes most of a plain kernel's time: the
# same lines of C, with that instruction where it is there.
ASAN_FMA = $(if $(HAVE_X86),$(shell grep -qw fma /proc/cpuinfo && echo '-mfma -ffp-contract=off'))
ASAN_SUITES = $(MAKE) BUILD=build-asan SANITIZE=address,undefined CFLAGS='$(ASAN_FMA) $(SANITIZED_CFLAGS)' check-suites
check-asan:
	+CK_FORK=no MOE_SANITIZED=1 $(ASAN_SUITES)
# Every case at its full size.
.PHONY: check-asan-long
check-asan-long:
	+CK_FORK=no $(ASAN_SUITES)

# What threads share does not depend on the instruction set: the plain variants, with AVX2 where that is there,
# since a fused multiply-add without is a call.
TSAN_ISA = $(if $(HAVE_X86),$(shell grep -qw avx2 /proc/cpuinfo && echo '$(ISA_FLAGS_avx2)'))
THREADED := threads determinism experts layer comm ranks
TSAN_PROGRAMS := $(THREADED:%=build-tsan/tests/check_%) $(HOSTS:$(BUILD)/%=build-tsan/%)
check-tsan:
	$(MAKE) BUILD=build-tsan SANITIZE=thread CFLAGS='$(SANITIZED_CFLAGS)' VARIANTS='$(PLAIN_VARIANTS)' HAVE_X86= \
	    ISA_FLAGS_plain='$(TSAN_ISA)' $(TSAN_PROGRAMS)
	@MOE_SANITIZED=1 MOE_FEW=1 $(RUN) $(TSAN_PROGRAMS)

# The whole suite as a test of kernels: each fast one is followed by its plain twin (docs/testing.md). Objects that
# the ordinary build has are taken from it. MOE_SANITIZED: determinism at the size that is for slow builds.
.PHONY: check-twin twin-suites
# Left out: those of files, numbers and products, which call no table, and check_memory, which counts allocations.
TWIN_SUITES := $(filter-out %/check_memory %/check_gemm %/check_numeric %/check_status %/check_io_file %/check_io_import,\
    $(SUITES))
check-twin: $(LIB)/libmoe.a
	@mkdir -p build-twin
	test -d build-twin/src || cp -rp $(BUILD)/src $(FLAGS_STAMP) build-twin
	MOE_SANITIZED=1 CK_DEFAULT_TIMEOUT=120 $(MAKE) TWIN=1 BUILD=build-twin LIB=build-twin/lib twin-suites
twin-suites: $(TWIN_SUITES) $(HOSTS) $(BUILD)/run_vectors
	@test -n '$(TWIN)' || { echo 'twin-suites is for TWIN=1: make check-twin'; exit 1; }
	@$(RUN) $(TWIN_SUITES) $(HOSTS) $(VECTORS) "$(BUILD)/run_vectors --isa avx2 tests/vectors"

# aarch64 in emulation; says what is missing where it cannot run. NEON_CC, NEON_RUN: another compiler, or a machine.
.PHONY: check-neon
check-neon: $(BUILD)/tests/check_determinism
	@JOBS=$(JOBS) MAKE='$(MAKE)' sh tests/neon/check.sh $(BUILD)

VALGRIND := valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,possible
NEED = @command -v $(1) >/dev/null || { echo 'This needs $(1): apt-get install $(2)'; exit 1; }
check-valgrind: $(HOSTS)
	$(call NEED,valgrind,valgrind)
	@$(RUN) $(foreach h,$(HOSTS),"$(VALGRIND) $(h)")

check-long:
	MOE_LONG=1 $(MAKE) check
	$(MAKE) check-asan-long check-tsan check-valgrind check-twin check-neon
	$(MAKE) CC=clang BUILD=build-clang check-suites
	LONG=1 NUMBERS=12 $(MAKE) check-mpi MPI_TESTED='$(MPIS)' RANKS='2 3 4 8'
	$(MAKE) check-nccl check-nccl-long
	$(MAKE) check-mutants bench-scale
	$(MAKE) check-libtorch check-python check-torch compare-torch check-torch-current
	for isa in plain avx2; do $(BUILD)/run_vectors --isa $$isa tests/vectors || exit 1; done

# ---- format and baselines ---------------------------------------------------------------------------

FORMATTED := $(wildcard include/moe/*.h src/*.[ch] src/comm/*.[ch] src/cpu/*.[ch] src/cpu/twin/*.[ch] src/io/*.[ch] examples/*.[ch] examples/*.cpp \
    examples/demo/*.[ch] tests/*.c tests/reference/*.[ch] tests/support/*.[ch] tests/hosts/*.[ch] \
    tests/vector_runner/*.[ch] tests/bench/*.[ch] tests/ranks/*.c cuda/*.[ch] cuda/*.cu tests/emulation/*.[ch] \
    tests/emulation/*.cu tests/emulation/*.cpp tests/cuda/*.c tests/support/device/*.[ch])
format:
	$(call NEED,clang-format,clang-format)
	clang-format -i $(FORMATTED)
check-format:
	$(call NEED,clang-format,clang-format)
	clang-format --dry-run -Werror $(FORMATTED)

abi-baseline: $(LIB)/libmoe.so
	sh tests/abi/baseline.sh $(LIB)

include tests/emulation/emulation.mk

-include $(SUITES:=.d) $(HOSTS:=.d) $(EXAMPLES:=.d) $(SUPPORT_OBJECTS:=.d)

include tests/emulation/suites.mk
include tests/cuda/cuda.mk
