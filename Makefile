# libmoe: `make help` lists the targets.

CC ?= cc
ifeq ($(origin CC),default)
CC := cc
endif
AR ?= ar
# 1: every call of a fast CPU kernel is followed by that of its plain twin, and both are compared (docs/testing.md).
TWIN ?=
BUILD ?= $(if $(TWIN),build-twin,build)
LIB ?= $(if $(filter build,$(BUILD)),lib,$(BUILD)/lib)
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DESTDIR ?=
# 1: warnings are errors. Not by default: newer compilers know more of them.
WERROR ?= 0
SANITIZE ?=
PKG_CONFIG ?= pkg-config
# Files compiled at once by check and demo, where make was called without -j; test programs run at once.
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
AT_ONCE = $(MAKE) --no-print-directory $(if $(findstring jobserver,$(MAKEFLAGS)),,-j$(JOBS))
# The scripts of tests/ use the same compiler.
export CC

MAJOR := $(shell sed -n 's/^.define MOE_VERSION_MAJOR \([0-9]*\)/\1/p' include/moe/version.h)
MINOR := $(shell sed -n 's/^.define MOE_VERSION_MINOR \([0-9]*\)/\1/p' include/moe/version.h)
PATCH := $(shell sed -n 's/^.define MOE_VERSION_PATCH \([0-9]*\)/\1/p' include/moe/version.h)
VERSION := $(MAJOR).$(MINOR).$(PATCH)
SONAME := libmoe.so.$(shell cat src/soname)
MACHINE := $(shell $(CC) $(CFLAGS) -dumpmachine 2>/dev/null)

# ---- flags ----------------------------------------------------------------------------------------

WARN := -Wall -Wextra -Wpedantic -Wshadow -Wconversion $(if $(filter 1,$(WERROR)),-Werror)
ifneq ($(SANITIZE),)
SAN := -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer
endif
COMMON := -std=c11 -g -pthread -D_GNU_SOURCE -Iinclude -Isrc $(WARN) $(SAN)
# No contraction: an expression is a fused multiply-add where the source says so and nowhere else.
MATH := -ffp-contract=off -fno-math-errno -fno-trapping-math
SHIPPED := $(COMMON) -fPIC -fvisibility=hidden -DNDEBUG -DMOE_BUILD $(MATH)
CFLAGS ?=

# ---- sources --------------------------------------------------------------------------------------

CORE := $(wildcard src/*.c) $(filter-out src/comm/mpi.c src/comm/nccl%,$(wildcard src/comm/*.c))
KERNELS := $(filter-out src/cpu/dispatch_isa.c,$(wildcard src/cpu/*.c))
PLAIN_VARIANTS := f32_plain f64_plain bf16_plain f16_plain
VARIANTS := $(PLAIN_VARIANTS)
# What is stored; f32 is the sources' own.
ELEMENT_f64 := -DMOE_F64
ELEMENT_bf16 := -DMOE_BF16
ELEMENT_f16 := -DMOE_F16
ISA_FLAGS_plain :=
ISA_FLAGS_avx2 := -mavx2 -mfma
ISA_FLAGS_avx512 := -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma -mprefer-vector-width=512
# What the compiler makes code for decides, not what it runs on.
X86 := $(shell $(CC) $(CFLAGS) $(ISA_FLAGS_avx2) $(ISA_FLAGS_avx512) -dM -E -x c /dev/null 2>/dev/null | \
    grep -cE '__(x86_64|AVX512BW|FMA)__')
ifeq ($(X86),3)
VARIANTS += $(foreach i,avx2 avx512,f32_$(i) f64_$(i) bf16_$(i) f16_$(i))
HAVE_X86 := -DMOE_HAVE_X86
endif

# Of no release: in the library with TWIN=1, whose other objects are the release's, and in a test.
TWIN_OBJECTS := $(patsubst %.c,$(BUILD)/%.o,$(wildcard src/cpu/twin/*.c))
CORE_OBJECTS := $(CORE:%.c=$(BUILD)/%.o)
CORE_OBJECTS += $(if $(TWIN),$(BUILD)/src/cpu/dispatch_isa_twin.o $(TWIN_OBJECTS),$(BUILD)/src/cpu/dispatch_isa.o)
KERNEL_OBJECTS := $(foreach v,$(VARIANTS),$(KERNELS:src/cpu/%.c=$(BUILD)/src/cpu/%.$(v).o))
OBJECTS := $(CORE_OBJECTS) $(KERNEL_OBJECTS)

.PHONY: all host help clean install uninstall dist demo demo-long demo-mpi demo-cuda
# All but the libraries for GPUs, which take minutes to compile.
host: $(LIB)/libmoe.a $(LIB)/libmoe.so $(LIB)/pkgconfig/moe.pc mpi io
all: host cuda nccl
	@printf '\n%-24s %s\n' 'built' 'what'
	@printf '%-24s %s\n' '$(LIB)/libmoe.a' 'static library, $(words $(VARIANTS)) CPU variants: $(VARIANTS)'
	@printf '%-24s %s\n' '$(LIB)/libmoe.so' 'shared library $(SONAME), version $(VERSION)'
	@$(or $(foreach f,$(MPIS),printf '%-24s %s\n' '$(LIB)/libmoe_mpi_$(f).so' 'groups over MPI ($(MPICC_$(f))), also .a';), \
	    printf '%-24s %s\n' 'not built' 'libmoe_mpi: no mpicc (libopenmpi-dev or libmpich-dev; MPICC=)')
	@printf '%-24s %s\n' $(if $(HAVE_IO),'$(LIB)/libmoe_io.so' 'files and checkpoints (jansson $(HAVE_IO))$(comma) also .a', \
	    'not built' 'libmoe_io with its tests and examples: $(NO_IO_REASON)')
	@printf '%-24s %s\n' $(if $(HAVE_CUDA),'$(LIB)/libmoe_cuda.so' 'NVIDIA GPUs ($(CUDA_ARCHS))$(comma) also .a', \
	    'not built' 'libmoe_cuda: $(NO_CUDA_REASON)')
	@printf '%-24s %s\n' $(if $(HAVE_NCCL),'$(LIB)/libmoe_nccl.so' 'groups over NCCL ($(NCCL_INCLUDE))$(comma) also .a', \
	    'not built' 'libmoe_nccl: $(NO_NCCL_REASON)')
ifeq ($(HAVE_X86),)
	@printf '%-24s %s\n' 'not built' 'AVX2 and AVX-512 variants: $(CC) makes none for $(MACHINE)'
endif

# Rebuild everything when compiler or flags change, link again when a source came or went.
FLAGS_STAMP := $(BUILD)/flags
OBJECTS_STAMP := $(BUILD)/objects
FLAGS_TEXT = $(CC) $(SHIPPED) $(CFLAGS) $(LDFLAGS) $(VARIANTS) $(ISA_FLAGS_plain)
QUOTED = '$(subst ','\'',$(strip $(1)))'
STAMP = @mkdir -p $(@D); printf '%s\n' $(call QUOTED,$(1)) | cmp -s - $@ || printf '%s\n' $(call QUOTED,$(1)) >$@
$(FLAGS_STAMP): force
	$(call STAMP,$(FLAGS_TEXT))
$(OBJECTS_STAMP): force
	$(call STAMP,$(OBJECTS))
.PHONY: force
force:

$(BUILD)/src/cpu/dispatch_isa.o: src/cpu/dispatch_isa.c $(FLAGS_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -O2 $(HAVE_X86) $(CFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/src/cpu/dispatch_isa_twin.o: src/cpu/dispatch_isa.c $(FLAGS_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -O2 $(HAVE_X86) -DMOE_TWIN $(CFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/src/cpu/twin/%.o: src/cpu/twin/%.c $(FLAGS_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -O2 $(HAVE_X86) $(CFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/src/%.o: src/%.c $(FLAGS_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -O2 $(CFLAGS) -MMD -MP -c $< -o $@

define KERNEL_RULE
$(BUILD)/src/cpu/%.$(1).o: src/cpu/%.c $(FLAGS_STAMP)
	@mkdir -p $$(@D)
	$$(CC) $$(SHIPPED) -O3 -DMOE_VARIANT=$(1) $$(ELEMENT_$(firstword $(subst _, ,$(1)))) \
	    $$(ISA_FLAGS_$(word 2,$(subst _, ,$(1)))) $$(CFLAGS) -MMD -MP -c $$< -o $$@
endef
$(foreach v,$(VARIANTS),$(eval $(call KERNEL_RULE,$(v))))

$(LIB)/libmoe.a: $(OBJECTS) $(OBJECTS_STAMP)
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $(OBJECTS)

$(LIB)/libmoe.so.$(VERSION): $(OBJECTS) $(OBJECTS_STAMP) src/libmoe.map src/soname
	@mkdir -p $(@D)
	$(CC) -shared $(SAN) $(CFLAGS) -Wl,-soname,$(SONAME) -Wl,--version-script=src/libmoe.map \
	    $(if $(SAN),,-Wl,-z,defs) -Wl,-z,relro,-z,now $(LDFLAGS) -o $@ $(OBJECTS) -lm -pthread

$(LIB)/libmoe.so: $(LIB)/libmoe.so.$(VERSION)
	ln -sf libmoe.so.$(VERSION) $(LIB)/$(SONAME)
	ln -sf $(SONAME) $@

# ---- libmoe_mpi: one for each MPI -----------------------------------------------------------------

# Debian's two MPIs are known by name; another one is MPICC=its-mpicc MPI_NAME=a-name.
MPICC_openmpi ?= mpicc.openmpi
MPICC_mpich ?= mpicc.mpich
MPI_NAME ?= mpi
MPICC_$(MPI_NAME) ?= $(or $(MPICC),mpicc)
have = $(shell command -v $(firstword $(1)) >/dev/null 2>&1 && echo yes)
ifneq ($(SANITIZE)$(NO_MPI),)
MPIS ?=
else ifneq ($(MPICC),)
MPIS ?= $(MPI_NAME)
else
MPIS ?= $(or $(strip $(foreach f,openmpi mpich,$(if $(call have,$(MPICC_$(f))),$(f)))),$(if $(call have,mpicc),mpi))
endif
MPI_SONAME = libmoe_mpi_$(1).so.$(shell cat src/soname)
MPI_LIBRARIES := $(foreach f,$(MPIS),$(LIB)/libmoe_mpi_$(f).a $(LIB)/libmoe_mpi_$(f).so)
MPI_PC := $(if $(MPIS),$(foreach f,$(MPIS),$(LIB)/pkgconfig/moe-mpi-$(f).pc) $(LIB)/pkgconfig/moe-mpi.pc)

.PHONY: mpi
mpi: $(MPI_LIBRARIES) $(MPI_PC)

define MPI_RULES
$(BUILD)/src/comm/mpi.$(1).o: src/comm/mpi.c $(FLAGS_STAMP)
	@mkdir -p $$(@D)
	OMPI_CC='$$(CC)' MPICH_CC='$$(CC)' $$(MPICC_$(1)) $$(SHIPPED) -O2 $$(CFLAGS) -MMD -MP -c $$< -o $$@
$(LIB)/libmoe_mpi_$(1).a: $(BUILD)/src/comm/mpi.$(1).o
	@mkdir -p $$(@D)
	rm -f $$@
	$$(AR) rcs $$@ $$<
$(LIB)/libmoe_mpi_$(1).so.$(VERSION): $(BUILD)/src/comm/mpi.$(1).o $(LIB)/libmoe.so src/comm/libmoe_mpi.map
	OMPI_CC='$$(CC)' MPICH_CC='$$(CC)' $$(MPICC_$(1)) -shared $$(CFLAGS) -Wl,-soname,$$(call MPI_SONAME,$(1)) \
	    -Wl,--version-script=src/comm/libmoe_mpi.map -Wl,-z,defs -Wl,-z,relro,-z,now $$(LDFLAGS) -o $$@ $$< \
	    -L$(LIB) -lmoe -pthread
$(LIB)/libmoe_mpi_$(1).so: $(LIB)/libmoe_mpi_$(1).so.$(VERSION)
	ln -sf libmoe_mpi_$(1).so.$(VERSION) $(LIB)/$$(call MPI_SONAME,$(1))
	ln -sf $$(call MPI_SONAME,$(1)) $$@
-include $(BUILD)/src/comm/mpi.$(1).d
endef
$(foreach f,$(MPIS),$(eval $(call MPI_RULES,$(f))))

# ---- libmoe_io: files -----------------------------------------------------------------------------

# NO_IO=1 leaves it out.
NO_IO ?=
JANSSON_CFLAGS ?= $(shell $(PKG_CONFIG) --cflags jansson 2>/dev/null)
JANSSON_LIBS ?= $(shell $(PKG_CONFIG) --libs jansson 2>/dev/null)
HAVE_IO := $(if $(NO_IO),,$(shell $(PKG_CONFIG) --modversion jansson 2>/dev/null))
NO_IO_REASON := $(if $(NO_IO),NO_IO is set,no jansson (libjansson-dev and pkg-config))
IO_SOURCES := $(wildcard src/io/*.c)
IO_OBJECTS := $(IO_SOURCES:%.c=$(BUILD)/%.o)
IO_SONAME := libmoe_io.so.$(shell cat src/soname)
IO_LIBRARIES := $(if $(HAVE_IO),$(LIB)/libmoe_io.a $(LIB)/libmoe_io.so)

.PHONY: io
io: $(IO_LIBRARIES) $(if $(HAVE_IO),$(LIB)/pkgconfig/moe-io.pc)

$(BUILD)/src/io/%.o: src/io/%.c $(FLAGS_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -O2 $(JANSSON_CFLAGS) $(CFLAGS) -MMD -MP -c $< -o $@
$(LIB)/libmoe_io.a: $(IO_OBJECTS)
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $(IO_OBJECTS)
$(LIB)/libmoe_io.so.$(VERSION): $(IO_OBJECTS) $(LIB)/libmoe.so src/io/libmoe_io.map
	$(CC) -shared $(SAN) $(CFLAGS) -Wl,-soname,$(IO_SONAME) -Wl,--version-script=src/io/libmoe_io.map \
	    $(if $(SAN),,-Wl,-z,defs) -Wl,-z,relro,-z,now $(LDFLAGS) -o $@ $(IO_OBJECTS) -L$(LIB) -lmoe \
	    $(JANSSON_LIBS) -lm -pthread
$(LIB)/libmoe_io.so: $(LIB)/libmoe_io.so.$(VERSION)
	ln -sf libmoe_io.so.$(VERSION) $(LIB)/$(IO_SONAME)
	ln -sf $(IO_SONAME) $@

# ---- libmoe_cuda: contexts on an NVIDIA GPU -------------------------------------------------------

# NO_CUDA=1 leaves it out. The toolkit is CUDA; code for CUDA_ARCHS, and PTX of CUDA_PTX for devices to come.
NO_CUDA ?=
CUDA ?= /usr/local/cuda
CUDA_INCLUDE ?= $(CUDA)/include
CUDA_LIB ?= $(firstword $(wildcard $(CUDA)/lib64 $(CUDA)/lib))
NVCC ?= $(CUDA)/bin/nvcc
CUDA_ARCHS ?= 80 90 100
CUDA_PTX ?= 80 100
NVCC_FLAGS ?=
NO_CUDA_REASON := $(strip $(if $(NO_CUDA),NO_CUDA is set,$(if $(SANITIZE),not with SANITIZE,\
    $(if $(call have,$(NVCC)),$(if $(wildcard $(CUDA_INCLUDE)/cublas_v2.h),\
    $(if $(wildcard $(CUDA_LIB)/libcublas.so),$(if $(wildcard $(CUDA_LIB)/libcudart.so),,no libcudart.so in CUDA_LIB=$(CUDA_LIB)),\
    no libcublas.so in CUDA_LIB=$(CUDA_LIB)),no cublas_v2.h in CUDA_INCLUDE=$(CUDA_INCLUDE)),no nvcc ($(NVCC); CUDA=)))))
HAVE_CUDA := $(if $(NO_CUDA_REASON),,yes)
CUDA_SONAME := libmoe_cuda.so.$(shell cat src/soname)
CUDA_LIBRARIES := $(if $(HAVE_CUDA),$(LIB)/libmoe_cuda.a $(LIB)/libmoe_cuda.so)
CUDA_HOST_OBJECTS := $(patsubst %.c,$(BUILD)/%.o,$(wildcard cuda/*.c))
CUDA_KERNEL_OBJECTS := $(patsubst %.cu,$(BUILD)/%.cu.o,$(wildcard cuda/*.cu))
CUDA_OBJECTS := $(CUDA_HOST_OBJECTS) $(CUDA_KERNEL_OBJECTS)
CUDA_CODE = $(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
    $(foreach a,$(CUDA_PTX),-gencode arch=compute_$(a),code=compute_$(a))
# As on the host no contraction, and no C++ runtime. What ptxas says of kernels is kept in *.cu.log.
CUDA_FLAGS = -std=c++17 -O3 --fmad=false $(CUDA_CODE) -Iinclude -Isrc -Icuda -DNDEBUG -DMOE_BUILD \
    $(if $(filter 1,$(WERROR)),-Werror all-warnings) --cudart shared \
    -Xcompiler -fPIC$(comma)-fvisibility=hidden$(comma)-fno-exceptions$(comma)-fno-rtti$(comma)-fno-threadsafe-statics \
    -Xcompiler -Wall$(comma)-Wextra -Xptxas -v $(NVCC_FLAGS)
# Rebuild when that changes.
CUDA_STAMP := $(BUILD)/cuda/flags
$(CUDA_STAMP): force
	$(call STAMP,$(FLAGS_TEXT) $(NVCC) $(CUDA_FLAGS) $(CUDA_OBJECTS))

.PHONY: cuda
cuda: $(CUDA_LIBRARIES) $(if $(HAVE_CUDA),$(LIB)/pkgconfig/moe-cuda.pc)

$(BUILD)/cuda/%.o: cuda/%.c $(CUDA_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -Icuda -isystem $(CUDA_INCLUDE) -O2 $(CFLAGS) -MMD -MP -c $< -o $@
$(BUILD)/cuda/%.cu.o: cuda/%.cu $(CUDA_STAMP)
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -MMD -MP -MF $(@:.o=.d) -c $< -o $@ 2>$(@:.o=.log) || { cat $(@:.o=.log) >&2; exit 1; }
$(LIB)/libmoe_cuda.a: $(CUDA_OBJECTS) $(CUDA_STAMP)
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $(CUDA_OBJECTS)
$(LIB)/libmoe_cuda.so.$(VERSION): $(CUDA_OBJECTS) $(CUDA_STAMP) $(LIB)/libmoe.so cuda/libmoe_cuda.map
	$(CC) -shared $(CFLAGS) -Wl,-soname,$(CUDA_SONAME) -Wl,--version-script=cuda/libmoe_cuda.map \
	    -Wl,-z,defs -Wl,-z,relro,-z,now $(LDFLAGS) -o $@ $(CUDA_OBJECTS) -L$(LIB) -lmoe -L$(CUDA_LIB) \
	    -lcublas -lcudart -pthread
$(LIB)/libmoe_cuda.so: $(LIB)/libmoe_cuda.so.$(VERSION)
	ln -sf libmoe_cuda.so.$(VERSION) $(LIB)/$(CUDA_SONAME)
	ln -sf $(CUDA_SONAME) $@

# ---- libmoe_nccl: ranks over NCCL -----------------------------------------------------------------

# NO_NCCL=1 leaves it out. NCCL is that of NCCL_HOME, or beside CUDA's own libraries, or as pkg-config says.
NO_NCCL ?=
NCCL_HOME ?=
NCCL_OF_PC = $(shell $(PKG_CONFIG) --variable=$(1) nccl 2>/dev/null)
NCCL_WHERE := $(if $(NCCL_HOME),$(NCCL_HOME),$(if $(wildcard $(CUDA_INCLUDE)/nccl.h),,$(if $(NO_NCCL),,$(call NCCL_OF_PC,prefix))))
NCCL_INCLUDE ?= $(firstword $(if $(NCCL_WHERE),$(NCCL_WHERE)/include) $(CUDA_INCLUDE))
NCCL_LIB ?= $(firstword $(patsubst %/libnccl.so,%,$(wildcard $(addsuffix /libnccl.so,\
    $(if $(NCCL_WHERE),$(NCCL_WHERE)/lib64 $(NCCL_WHERE)/lib $(if $(NCCL_HOME),,$(call NCCL_OF_PC,libdir)),$(CUDA_LIB))))))
NO_NCCL_REASON := $(strip $(if $(NO_NCCL),NO_NCCL is set,$(if $(HAVE_CUDA),\
    $(if $(wildcard $(NCCL_INCLUDE)/nccl.h),$(if $(wildcard $(NCCL_LIB)/libnccl.so),,\
    no libnccl.so (NCCL_HOME=$(comma) NCCL_LIB=)),no nccl.h in $(NCCL_INCLUDE) (NCCL_HOME=)),without libmoe_cuda: $(NO_CUDA_REASON))))
HAVE_NCCL := $(if $(NO_NCCL_REASON),,yes)
NCCL_SONAME := libmoe_nccl.so.$(shell cat src/soname)
NCCL_LIBRARIES := $(if $(HAVE_NCCL),$(LIB)/libmoe_nccl.a $(LIB)/libmoe_nccl.so)
NCCL_SOURCES := $(wildcard src/comm/nccl*.c)
NCCL_OBJECTS := $(NCCL_SOURCES:%.c=$(BUILD)/%.o)

.PHONY: nccl
nccl: $(NCCL_LIBRARIES) $(if $(HAVE_NCCL),$(LIB)/pkgconfig/moe-nccl.pc)

$(NCCL_OBJECTS): $(BUILD)/%.o: %.c $(CUDA_STAMP)
	@mkdir -p $(@D)
	$(CC) $(SHIPPED) -isystem $(NCCL_INCLUDE) -isystem $(CUDA_INCLUDE) -O2 $(CFLAGS) -MMD -MP -c $< -o $@
$(LIB)/libmoe_nccl.a: $(NCCL_OBJECTS)
	@mkdir -p $(@D)
	rm -f $@
	$(AR) rcs $@ $(NCCL_OBJECTS)
$(LIB)/libmoe_nccl.so.$(VERSION): $(NCCL_OBJECTS) $(LIB)/libmoe.so $(LIB)/libmoe_cuda.so src/comm/libmoe_nccl.map
	$(CC) -shared $(CFLAGS) -Wl,-soname,$(NCCL_SONAME) -Wl,--version-script=src/comm/libmoe_nccl.map \
	    -Wl,-z,defs -Wl,-z,relro,-z,now $(LDFLAGS) -o $@ $(NCCL_OBJECTS) -L$(LIB) -lmoe_cuda -lmoe \
	    -L$(NCCL_LIB) -lnccl -L$(CUDA_LIB) -lcudart -ldl -pthread
$(LIB)/libmoe_nccl.so: $(LIB)/libmoe_nccl.so.$(VERSION)
	ln -sf libmoe_nccl.so.$(VERSION) $(LIB)/$(NCCL_SONAME)
	ln -sf $(NCCL_SONAME) $@

# ---- pkg-config -----------------------------------------------------------------------------------

# $(call PC_OF,prefix,libdir,includedir,name,library,requires,private requires,private libraries,description)
PC_OF = sed -e 's|@PREFIX@|$(1)|' -e 's|@LIBDIR@|$(2)|' -e 's|@INCLUDEDIR@|$(3)|' -e 's|@VERSION@|$(VERSION)|' \
    -e 's|@NAME@|$(4)|' -e 's|@LIBRARY@|$(5)|' -e 's|@REQUIRES@|$(6)|' -e 's|@REQUIRES_PRIVATE@|$(7)|' \
    -e 's|@PRIVATE@|$(8)|' -e 's|@DESCRIPTION@|$(9)|' moe.pc.in
# $(call PC,prefix,libdir,includedir)
PC = $(call PC_OF,$(1),$(2),$(3),libmoe,moe,,,-lm -pthread,Mixture-of-Experts layer$(comma) forward and backward)
comma := ,
# $(call PC_MPI,prefix,libdir,includedir,MPI)
PC_MPI = $(call PC_OF,$(1),$(2),$(3),libmoe_mpi,moe_mpi_$(4),moe = $(VERSION),,,libmoe groups over MPI ($(4)))
# $(call PC_IO,prefix,libdir,includedir)
PC_IO = $(call PC_OF,$(1),$(2),$(3),libmoe_io,moe_io,moe = $(VERSION),jansson,-lm -pthread,libmoe files and checkpoints)
# $(call PC_CUDA,prefix,libdir,includedir)
PC_CUDA = $(call PC_OF,$(1),$(2),$(3),libmoe_cuda,moe_cuda,moe = $(VERSION),,-L$(CUDA_LIB) -lcublas -lcudart -pthread,libmoe on NVIDIA GPUs)
# $(call PC_NCCL,prefix,libdir,includedir)
PC_NCCL = $(call PC_OF,$(1),$(2),$(3),libmoe_nccl,moe_nccl,moe-cuda = $(VERSION),,-L$(NCCL_LIB) -lnccl -ldl -pthread,libmoe groups over NCCL)
REPLACE = @if cmp -s $@.new $@; then rm -f $@.new; else mv $@.new $@; fi

# The file for the tree names the tree, which may have moved.
$(LIB)/pkgconfig/moe.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include) >$@.new
	$(REPLACE)
$(LIB)/pkgconfig/moe-mpi-%.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC_MPI,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include,$*) >$@.new
	$(REPLACE)
# The first of them.
$(LIB)/pkgconfig/moe-mpi.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC_MPI,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include,$(firstword $(MPIS))) >$@.new
	$(REPLACE)

$(LIB)/pkgconfig/moe-io.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC_IO,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include) >$@.new
	$(REPLACE)

$(LIB)/pkgconfig/moe-cuda.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC_CUDA,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include) >$@.new
	$(REPLACE)

$(LIB)/pkgconfig/moe-nccl.pc: moe.pc.in force
	@mkdir -p $(@D)
	@$(call PC_NCCL,$(CURDIR),$(abspath $(LIB)),$(CURDIR)/include) >$@.new
	$(REPLACE)

# ---- install --------------------------------------------------------------------------------------

HEADERS := $(wildcard include/moe/*.h)

install: $(LIB)/libmoe.a $(LIB)/libmoe.so mpi io cuda nccl
	install -d $(DESTDIR)$(INCLUDEDIR)/moe $(DESTDIR)$(LIBDIR)/pkgconfig
	install -m 644 $(HEADERS) $(DESTDIR)$(INCLUDEDIR)/moe
	install -m 644 $(LIB)/libmoe.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/libmoe.so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libmoe.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(LIBDIR)/libmoe.so
	$(call PC,$(PREFIX),$(LIBDIR),$(INCLUDEDIR)) > $(DESTDIR)$(LIBDIR)/pkgconfig/moe.pc
	$(foreach f,$(MPIS),$(call INSTALL_MPI,$(f)))
ifneq ($(MPIS),)
	ln -sf moe-mpi-$(firstword $(MPIS)).pc $(DESTDIR)$(LIBDIR)/pkgconfig/moe-mpi.pc
endif
ifneq ($(HAVE_IO),)
	install -m 644 $(LIB)/libmoe_io.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/libmoe_io.so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libmoe_io.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(IO_SONAME)
	ln -sf $(IO_SONAME) $(DESTDIR)$(LIBDIR)/libmoe_io.so
	$(call PC_IO,$(PREFIX),$(LIBDIR),$(INCLUDEDIR)) > $(DESTDIR)$(LIBDIR)/pkgconfig/moe-io.pc
endif
ifneq ($(HAVE_CUDA),)
	install -m 644 $(LIB)/libmoe_cuda.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/libmoe_cuda.so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libmoe_cuda.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(CUDA_SONAME)
	ln -sf $(CUDA_SONAME) $(DESTDIR)$(LIBDIR)/libmoe_cuda.so
	$(call PC_CUDA,$(PREFIX),$(LIBDIR),$(INCLUDEDIR)) > $(DESTDIR)$(LIBDIR)/pkgconfig/moe-cuda.pc
endif
ifneq ($(HAVE_NCCL),)
	install -m 644 $(LIB)/libmoe_nccl.a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/libmoe_nccl.so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libmoe_nccl.so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(NCCL_SONAME)
	ln -sf $(NCCL_SONAME) $(DESTDIR)$(LIBDIR)/libmoe_nccl.so
	$(call PC_NCCL,$(PREFIX),$(LIBDIR),$(INCLUDEDIR)) > $(DESTDIR)$(LIBDIR)/pkgconfig/moe-nccl.pc
endif
	chmod 644 $(DESTDIR)$(LIBDIR)/pkgconfig/moe*.pc
define INSTALL_MPI
install -m 644 $(LIB)/libmoe_mpi_$(1).a $(DESTDIR)$(LIBDIR)
	install -m 755 $(LIB)/libmoe_mpi_$(1).so.$(VERSION) $(DESTDIR)$(LIBDIR)
	ln -sf libmoe_mpi_$(1).so.$(VERSION) $(DESTDIR)$(LIBDIR)/$(call MPI_SONAME,$(1))
	ln -sf $(call MPI_SONAME,$(1)) $(DESTDIR)$(LIBDIR)/libmoe_mpi_$(1).so
	$(call PC_MPI,$(PREFIX),$(LIBDIR),$(INCLUDEDIR),$(1)) > $(DESTDIR)$(LIBDIR)/pkgconfig/moe-mpi-$(1).pc
	
endef

uninstall:
	rm -f $(HEADERS:include/%=$(DESTDIR)$(INCLUDEDIR)/%)
	rm -f $(DESTDIR)$(LIBDIR)/libmoe.a $(DESTDIR)$(LIBDIR)/libmoe.so $(DESTDIR)$(LIBDIR)/$(SONAME)
	rm -f $(DESTDIR)$(LIBDIR)/libmoe.so.$(VERSION) $(DESTDIR)$(LIBDIR)/pkgconfig/moe.pc
	rm -f $(DESTDIR)$(LIBDIR)/libmoe_mpi_* $(DESTDIR)$(LIBDIR)/pkgconfig/moe-mpi*.pc
	rm -f $(DESTDIR)$(LIBDIR)/libmoe_io.* $(DESTDIR)$(LIBDIR)/pkgconfig/moe-io.pc
	rm -f $(DESTDIR)$(LIBDIR)/libmoe_cuda.* $(DESTDIR)$(LIBDIR)/pkgconfig/moe-cuda.pc
	rm -f $(DESTDIR)$(LIBDIR)/libmoe_nccl.* $(DESTDIR)$(LIBDIR)/pkgconfig/moe-nccl.pc
	-rmdir $(DESTDIR)$(INCLUDEDIR)/moe 2>/dev/null || true

# What git tracks as it is now, or, in an unpacked archive, everything but what the build made.
ARCHIVE := libmoe-$(VERSION)
TRACKED = if test -e .git; then git ls-files; \
    else find . -type f ! -path './build*/*' ! -path './dist/*' ! -path './lib/lib*' ! -path './lib/pkgconfig/*' | \
    sed 's|^\./||'; fi
dist:
	@mkdir -p dist
	@$(TRACKED) | sort | while read -r file; do test ! -f "$$file" || echo "$$file"; done >dist/files
	tar -czf dist/$(ARCHIVE).tar.gz --owner=0 --group=0 --transform='s|^|$(ARCHIVE)/|' --no-recursion -T dist/files
	@rm -f dist/files

# Only what the build makes, by name: BUILD and LIB may be anywhere.
clean:
	rm -rf $(BUILD)/src $(BUILD)/cuda $(BUILD)/bench $(BUILD)/tests $(BUILD)/examples $(BUILD)/venv $(BUILD)/venv-current
	rm -rf $(BUILD)/gpu $(BUILD)/emulation
	rm -f $(BUILD)/bench_scale $(BUILD)/bench_cuda
	rm -f $(BUILD)/demo $(BUILD)/demo_cuda $(BUILD)/demo_mpi_* $(BUILD)/run_vectors $(FLAGS_STAMP) $(OBJECTS_STAMP)
	rm -f $(LIB)/libmoe.a $(LIB)/libmoe.so $(LIB)/libmoe.so.* $(LIB)/pkgconfig/moe.pc
	rm -f $(LIB)/libmoe_mpi_* $(LIB)/pkgconfig/moe-mpi*.pc $(LIB)/libmoe_io.* $(LIB)/pkgconfig/moe-io.pc
	rm -f $(LIB)/libmoe_cuda.* $(LIB)/pkgconfig/moe-cuda.pc $(LIB)/libmoe_nccl.* $(LIB)/pkgconfig/moe-nccl.pc
	rm -rf build-asan build-tsan build-clang build-twin build-neon dist
	-@rmdir $(LIB)/pkgconfig $(BUILD) 2>/dev/null || true

# ---- demo -----------------------------------------------------------------------------------------

DEMO := $(filter-out %/ranks_mpi.c %/ranks_nccl.c %/device_cuda.c,$(wildcard examples/demo/*.c))
DEMO_HEADERS := $(wildcard examples/demo/*.h include/moe/*.h)
DEMO_FLAGS = -std=c11 -O3 -march=native -Wall -Wextra -Iinclude $(SAN) $(CFLAGS)
$(BUILD)/demo: $(DEMO) $(DEMO_HEADERS) $(LIB)/libmoe.a
	$(CC) $(DEMO_FLAGS) $(DEMO) $(LIB)/libmoe.a $(LDFLAGS) -lm -pthread -o $@

# The same with an MPI below it, one for each; MPI= chooses, MPIRUN= is another command that starts ranks.
MPI ?= $(firstword $(MPIS))
LAUNCH = sh tests/ranks/launch.sh $(MPI)
DEMO_MPI := $(subst ranks_none,ranks_mpi,$(DEMO))
define DEMO_MPI_RULE
$(BUILD)/demo_mpi_$(1): $(DEMO_MPI) $(DEMO_HEADERS) $(LIB)/libmoe.a $(LIB)/libmoe_mpi_$(1).a
	OMPI_CC='$$(CC)' MPICH_CC='$$(CC)' $$(MPICC_$(1)) $$(DEMO_FLAGS) $(DEMO_MPI) $(LIB)/libmoe_mpi_$(1).a \
	    $(LIB)/libmoe.a $$(LDFLAGS) -lm -pthread -o $$@
endef
$(foreach f,$(MPIS),$(eval $(call DEMO_MPI_RULE,$(f))))

DEMO_ARGS = $(if $(FILE),--file '$(subst ','\'',$(FILE))') $(if $(STEPS),--steps $(STEPS)) $(ARGS)
demo:
	+@$(AT_ONCE) $(BUILD)/demo
	$(BUILD)/demo $(DEMO_ARGS)

demo-mpi: RANKS = 4
ifneq ($(filter $(MPI),$(MPIS)),)
demo-mpi: $(BUILD)/demo_mpi_$(MPI)
	$(LAUNCH) $(RANKS) $(BUILD)/demo_mpi_$(MPI) $(DEMO_ARGS)
else
demo-mpi:
	@echo '$(if $(MPIS),MPI=$(MPI): here it can be $(strip $(MPIS)),demo-mpi needs an MPI: apt-get install libopenmpi-dev openmpi-bin)' >&2; exit 1
endif

# The same with its layers on a GPU, or on GPUS of them over NCCL where that is.
GPUS ?= 1
DEMO_CUDA := $(subst device_none,device_cuda,$(if $(HAVE_NCCL),$(subst ranks_none,ranks_nccl,$(DEMO)),$(DEMO)))
$(BUILD)/demo_cuda: $(DEMO_CUDA) $(DEMO_HEADERS) $(LIB)/libmoe.a $(LIB)/libmoe_cuda.a $(if $(HAVE_NCCL),$(LIB)/libmoe_nccl.a)
	$(CC) $(DEMO_FLAGS) $(if $(HAVE_NCCL),-isystem $(NCCL_INCLUDE)) -isystem $(CUDA_INCLUDE) $(DEMO_CUDA) $(LDFLAGS) \
	    $(if $(HAVE_NCCL),$(LIB)/libmoe_nccl.a -L$(NCCL_LIB) -lnccl -Wl$(comma)-rpath$(comma)$(NCCL_LIB)) \
	    $(LIB)/libmoe_cuda.a $(LIB)/libmoe.a -L$(CUDA_LIB) -lcublas -lcudart -Wl,-rpath,$(CUDA_LIB) -lm -ldl -pthread -o $@
ifneq ($(HAVE_CUDA),)
demo-cuda: $(BUILD)/demo_cuda
	$(if $(HAVE_NCCL),,$(if $(filter-out 1,$(GPUS)),@echo 'GPUS=$(GPUS) needs NCCL: $(NO_NCCL_REASON)' >&2; exit 1))
	$(BUILD)/demo_cuda $(if $(HAVE_NCCL),--gpus $(GPUS)) $(DEMO_ARGS)
else
demo-cuda:
	@echo 'demo-cuda needs the CUDA toolkit: $(NO_CUDA_REASON)' >&2; exit 1
endif

# Both models with three learning rates and three seeds: about half an hour on two cores.
demo-long: $(BUILD)/demo
	$(BUILD)/demo --sweep $(DEMO_ARGS)

help:
	@sed -n 's/^#: //p' Makefile

#: make                build lib/libmoe.a and lib/libmoe.so (CC=, CFLAGS=, WERROR=1, BUILD=, LIB=)
#: make check          all tests of the first tier, under five minutes (JOBS= files compiled and programs run at once)
#: make check-examples examples, with what they print; check-tutorial; tutorial refreshes docs/tutorial.md
#: make check-python  the Python package, installed and tested; check-torch, compare-torch, check-libtorch
#: make check-torch-current  the same with PyPI's PyTorch (gigabytes)
#: make check-transformers  against the MoE blocks of transformers (gigabytes)
#: make check-mpi      ranks as processes (MPI_TESTED="openmpi mpich", RANKS="2 3 4 8")
#: make check-asan     suites, hosts and vectors under AddressSanitizer and UBSan; check-asan-long with every case
#: make check-tsan     threaded suites and hosts under ThreadSanitizer
#: make check-valgrind hosts under valgrind
#: make check-twin     the suites on a library (TWIN=1) that compares every fast kernel with its plain twin
#: make check-emulator  the emulator of CUDA (docs/emulation.md; CUDA=/usr/local/cuda, EMU_SEEDS="1 2 3")
#: make check-emulation  suites, vectors and kernels on an emulated GPU, also under sanitizers (EMU_SEED=1, EMU_JOBS=2);
#:                     check-emulation-plain without the sanitizers
#: make check-nccl     groups and layers over an emulated NCCL (NCCL_RANKS=2 or 2,4,8, NCCL_JOBS=4); check-nccl-long with more
#:                     ranks and every call that can fail
#: make cuda-traffic   bytes that each kernel moves, over what it must
#: make check-neon     suites and vectors for aarch64, by qemu (NEON_CC=aarch64-linux-gnu-gcc NEON_RUN="qemu-aarch64 -L ...")
#: make check-headers  each header alone in every language version
#: make cuda           libmoe_cuda alone (CUDA=/usr/local/cuda, CUDA_ARCHS="80 90 100", NO_CUDA=1)
#: make nccl           libmoe_nccl alone (NCCL_HOME=, NCCL_INCLUDE=, NCCL_LIB=, NO_NCCL=1)
#: make check-cuda-resources  registers and shared memory of every kernel against tests/cuda/budget.txt
#: make check-cuda-missing    libmoe_cuda on a machine without a GPU
#: make check-nccl-links  what libmoe_nccl takes of NCCL
#: make check-cuda     the layer's suites, vectors and example on a GPU (GPU_REQUIRED=1 fails without one)
#: make check-cuda-sanitizer  the same under compute-sanitizer (SANITIZERS="memcheck racecheck initcheck synccheck")
#: make check-cuda-users      examples, Python and benchmark of a GPU in emulation
#: make check-demo-cuda       the demo on one and two emulated GPUs beside the CPU
#: make check-abi      map, headers, symbols, layouts, abidiff
#: make check-format   clang-format
#: make check-mutants  deliberate mistakes in the numeric code, each of which must fail a test (python3)
#: make bench          libmoe in turns with dense chains, loops over experts, PyTorch and ggml: ratios beside targets, plots, in
#:                     build/bench; a quarter of an hour (THREADS=, ONLY=a-balanced-fwd, BENCH_PYTHON=); bench-quick three minutes
#: make check-instructions  instructions of fixed shapes against tests/bench/instructions.txt (valgrind); instructions renews it
#: make bench-scale    131,072 experts: peak memory, time per token (16 GiB; ROWS=, STEPS=)
#: make bench-ranks    weak scaling over MPI, bytes on the wire (RANKS="1 2", MPI=openmpi or mpich, TOKENS=,
#:                     EXPERTS=, TOPK=, D=, F=, O=, CHUNK=, STEPS=; all but RANKS of a rank)
#: make bench-cuda     layers on a GPU beside dense cuBLAS, time and bytes of each kernel (SHAPES=name,name DTYPES=bf16,f32
#:                     TOKENS=4096,16 ROUNDS=20 MODE=exact or padded KERNELS=1)
#: make check-long     everything long
#: make demo           train a language model and its dense twin (FILE=path, STEPS=n, ARGS=...); demo-long
#: make demo-mpi       the same on ranks (RANKS=4, MPI=openmpi or mpich, MPIRUN=, and as above)
#: make demo-cuda      the same on GPUs (GPUS=1; more over NCCL, and as above)
#: make install        PREFIX=, DESTDIR=, LIBDIR=, INCLUDEDIR=
#: make uninstall dist clean

include tests/tests.mk

-include $(OBJECTS:.o=.d) $(TWIN_OBJECTS:.o=.d) $(IO_OBJECTS:.o=.d) $(CUDA_OBJECTS:.o=.d) $(NCCL_OBJECTS:.o=.d)
