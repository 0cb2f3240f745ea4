# The C++ backend: the kernel files once per instruction set, each time in a namespace of its own, and dispatch.cpp,
# which picks at run time. Only kernel files get the flags; everything else runs on any CPU of the architecture.
set(kernel_sources
    cpu/attention.cpp
    cpu/ddim_move.cpp
    cpu/forward_diffusion.cpp
    cpu/geglu.cpp
    cpu/group_norm_silu.cpp
    cpu/group_norm_silu_backward.cpp
    cpu/layer_norm.cpp
    cpu/lora_merge.cpp
    cpu/packed_conv2d.cpp
    cpu/streamed_attention.cpp
    cpu/to_uint8.cpp
    cpu/token_head.cpp
    cpu/winograd_conv2d.cpp)

# Multiply-adds are written as fma() where one is meant: contraction would make the numbers depend on the compiler.
set(kernel_flags -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC's AVX-512 headers pass deliberately undefined operands (GCC bug 105593).
  list(APPEND kernel_flags -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

set(sdxl_fast_isas "")
function(sdxl_fast_add_isa name)
  add_library(sdxl_fast_${name} OBJECT ${kernel_sources})
  target_include_directories(sdxl_fast_${name} PRIVATE . include)
  target_compile_definitions(sdxl_fast_${name} PRIVATE SDXL_FAST_ISA=${name})
  target_compile_options(sdxl_fast_${name} PRIVATE ${warnings} ${kernel_flags} ${ARGN})
  target_sources(sdxl_fast PRIVATE $<TARGET_OBJECTS:sdxl_fast_${name}>)
  list(APPEND sdxl_fast_isas ${name})
  set(sdxl_fast_isas "${sdxl_fast_isas}" PARENT_SCOPE)
endfunction()

sdxl_fast_add_isa(baseline)
target_compile_definitions(sdxl_fast_baseline PRIVATE SDXL_FAST_WITH_F64)
target_sources(sdxl_fast PRIVATE cpu/dispatch.cpp cpu/entries_map.cpp cpu/entries_matrix.cpp
  cpu/entries_norm.cpp cpu/isa.cpp cpu/parallel.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-mavx512bf16 SDXL_FAST_COMPILES_AVX512_BF16)
  sdxl_fast_add_isa(avx2 ${avx2})
  sdxl_fast_add_isa(avx512 ${avx512})
  target_compile_definitions(sdxl_fast PRIVATE SDXL_FAST_HAVE_AVX2 SDXL_FAST_HAVE_AVX512)
  if(SDXL_FAST_COMPILES_AVX512_BF16)
    sdxl_fast_add_isa(avx512_bf16 ${avx512} -mavx512bf16)
    target_compile_definitions(sdxl_fast PRIVATE SDXL_FAST_HAVE_AVX512_BF16)
  endif()
endif()
