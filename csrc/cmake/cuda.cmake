# Decides whether CUDA is built and for which GPUs, and adds csrc/cuda/*.cu.

# out = ON when CUDA is to be built. auto needs nvcc and a GPU; on needs nvcc and fails without.
function(sdxl_fast_decide_cuda mode out)
  set(${out} OFF PARENT_SCOPE)
  if(mode MATCHES "^(off|0|false|no)$")
    return()
  endif()
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # a tree configured without nvcc remembers that there was none
  endif()
  if(mode STREQUAL "auto")
    sdxl_fast_gpu_archs(archs)
    if(archs STREQUAL "")
      message(STATUS "sdxl_fast: no NVIDIA GPU here, building without CUDA (SDXL_FAST_CUDA=on builds it all the same)")
      return()
    endif()
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      message(STATUS "sdxl_fast: a GPU but no nvcc, building without CUDA")
      return()
    endif()
  else()
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      message(FATAL_ERROR "SDXL_FAST_CUDA=on, but nvcc was not found: put it on PATH, set CUDACXX, or use SDXL_FAST_CUDA=off")
    endif()
  endif()
  set(${out} ON PARENT_SCOPE)
endfunction()

# out = the compute capabilities of this machine's GPUs as CUDA architectures ("90a;89"), or empty.
function(sdxl_fast_gpu_archs out)
  set(${out} "" PARENT_SCOPE)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE caps RESULT_VARIABLE status ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT "${status}" STREQUAL "0")
    return()
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" caps "${caps}")
  string(REPLACE "." "" caps "${caps}")
  # From Hopper on, the architecture-specific instructions need the 'a' target.
  list(TRANSFORM caps REPLACE "^(90|100|103)$" "\\1a")
  list(REMOVE_DUPLICATES caps)
  set(${out} "${caps}" PARENT_SCOPE)
endfunction()

# out = the folder of CUTLASS's headers, or empty: from CUTLASS_DIR, else from the Python package nvidia-cutlass, else from
# the checkout's .cutlass-VERSION, where `make cuda` has put that package.
function(sdxl_fast_find_cutlass out)
  set(${out} "" PARENT_SCOPE)
  set(hints "")
  set(CUTLASS_DIR "" CACHE PATH "CUTLASS, for the matrix kernels")
  if(NOT "$ENV{CUTLASS_DIR}" STREQUAL "")
    set(CUTLASS_DIR "$ENV{CUTLASS_DIR}" CACHE PATH "CUTLASS, for the matrix kernels" FORCE)
  endif()
  if(NOT CUTLASS_DIR STREQUAL "")
    list(APPEND hints "${CUTLASS_DIR}/include" "${CUTLASS_DIR}")
  endif()
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    set(ask "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')")
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "${ask}" OUTPUT_VARIABLE package ERROR_QUIET
                    OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(package)
      list(APPEND hints "${package}/source/include")
    endif()
  endif()
  file(GLOB fetched "${CMAKE_CURRENT_SOURCE_DIR}/../.cutlass-*/cutlass_library/source/include")
  foreach(hint IN LISTS hints fetched)
    if(EXISTS "${hint}/cutlass/cutlass.h")
      set(${out} "${hint}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

# The matrix kernels: Hopper alone, by CUTLASS's headers. Without either the library does without them and says so.
function(sdxl_fast_add_hopper target)
  set(archs "${CMAKE_CUDA_ARCHITECTURES}")
  list(FILTER archs INCLUDE REGEX "^90a(-real)?$")
  if(archs STREQUAL "")
    message(STATUS "sdxl_fast: no 90a among ${CMAKE_CUDA_ARCHITECTURES}, building without the matrix kernels")
    return()
  endif()
  sdxl_fast_find_cutlass(headers)
  if(headers STREQUAL "")
    message(STATUS "sdxl_fast: no CUTLASS (pip install nvidia-cutlass==4.2.0.0, or CUTLASS_DIR), building without the "
                   "matrix kernels")
    return()
  endif()
  file(STRINGS "${headers}/cutlass/version.h" lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  list(TRANSFORM lines REPLACE "#define CUTLASS_[A-Z]+ +([0-9]+).*" "\\1")
  list(JOIN lines "." version)
  message(STATUS "sdxl_fast: matrix kernels with CUTLASS ${version}")

  file(GLOB sources CONFIGURE_DEPENDS cuda/hopper/*.cu)
  add_library(sdxl_fast_hopper OBJECT ${sources})
  set_target_properties(sdxl_fast_hopper PROPERTIES
    CUDA_ARCHITECTURES 90a-real
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Static)
  target_include_directories(sdxl_fast_hopper SYSTEM PRIVATE "${headers}")
  target_compile_definitions(sdxl_fast_hopper PRIVATE CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED)
  target_compile_options(sdxl_fast_hopper PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:sdxl_fast_hopper>)
  target_compile_definitions(${target} PRIVATE SDXL_FAST_WITH_HOPPER "SDXL_FAST_CUTLASS_VERSION=\"${version}\"")
endfunction()

# A macro, because enable_language must run in the caller's scope.
macro(sdxl_fast_add_cuda target)
  if(NOT SDXL_FAST_CUDA_ARCHS STREQUAL "")
    set(CMAKE_CUDA_ARCHITECTURES "${SDXL_FAST_CUDA_ARCHS}")
  else()
    sdxl_fast_gpu_archs(CMAKE_CUDA_ARCHITECTURES)
    if(CMAKE_CUDA_ARCHITECTURES STREQUAL "")
      set(CMAKE_CUDA_ARCHITECTURES 90a)
    endif()
  endif()
  enable_language(CUDA)
  # Properties, since the target was made before CUDA was enabled. The runtime is static: the same library opens on a
  # machine that has no CUDA at all.
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Static)
  find_package(CUDAToolkit REQUIRED)

  file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/*.cu)
  target_sources(${target} PRIVATE ${cuda_sources})
  target_compile_definitions(${target} PRIVATE SDXL_FAST_WITH_CUDA "SDXL_FAST_CUDA_VERSION=\"${CUDAToolkit_VERSION}\"")
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  set(cuda_flags -lineinfo --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra)
  if(SDXL_FAST_WERROR)
    list(APPEND cuda_flags --Werror=all-warnings -Xcompiler=-Werror)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  sdxl_fast_add_hopper(${target})
endmacro()
