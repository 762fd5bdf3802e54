# Find an nvcc, or say in one clear line that the CUDA kernels are left out.
# Order: DSK_NVCC, CUDA_HOME, PATH, NVIDIA's pip wheels (site-packages/nvidia/cu13).
# Sets DSK_NVCC ("" when there is none) and DSK_NVCC_VERSION.
set(DSK_NVCC "" CACHE FILEPATH "nvcc used for the CUDA kernels (empty: search)")

if(NOT DSK_NVCC)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  unset(nvcc_found CACHE)
  find_program(nvcc_found nvcc
    PATHS "$ENV{CUDA_HOME}/bin" ENV PATH "${site_packages}/nvidia/cu13/bin"
    NO_DEFAULT_PATH)
  if(nvcc_found)
    set(DSK_NVCC ${nvcc_found})
  endif()
endif()

set(DSK_NVCC_VERSION "")
if(DSK_NVCC)
  execute_process(COMMAND ${DSK_NVCC} --version OUTPUT_VARIABLE nvcc_text ERROR_QUIET)
  if(nvcc_text MATCHES "V([0-9]+\\.[0-9]+\\.[0-9]+)")
    set(DSK_NVCC_VERSION ${CMAKE_MATCH_1})
  endif()
  if(DSK_NVCC_VERSION VERSION_LESS 12.8)
    message(STATUS "dskernels: ${DSK_NVCC} is ${DSK_NVCC_VERSION}, 12.8 or newer is needed; "
      "the CUDA kernels are left out")
    set(DSK_NVCC "")
  else()
    message(STATUS "dskernels: CUDA kernels compiled by ${DSK_NVCC} ${DSK_NVCC_VERSION}")
  endif()
else()
  message(STATUS "dskernels: no nvcc found (PATH, CUDA_HOME, pip's nvidia-cuda-nvcc); "
    "the CUDA kernels are left out, everything else is built")
endif()

# nvdisasm, for the summary of each cubin's machine code: the toolkit's, or the one in Triton's wheel.
# Without it the summaries are left out.
set(DSK_NVDISASM "")
if(DSK_NVCC)
  get_filename_component(nvcc_directory ${DSK_NVCC} DIRECTORY)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    OUTPUT_VARIABLE site_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  unset(nvdisasm_found CACHE)
  find_program(nvdisasm_found nvdisasm
    PATHS ${nvcc_directory} ENV PATH "${site_packages}/nvidia/cu13/bin"
      "${site_packages}/triton/backends/nvidia/bin"
    NO_DEFAULT_PATH)
  if(nvdisasm_found)
    set(DSK_NVDISASM ${nvdisasm_found})
  endif()
endif()
