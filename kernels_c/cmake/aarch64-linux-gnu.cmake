# Cross build for 64-bit ARM Linux with Debian's gcc-aarch64-linux-gnu; programs run under qemu-user where it is installed.
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=$PWD/kernels_c/cmake/aarch64-linux-gnu.cmake -DEDGETOK_TESTS=ON
#   cmake --build build/aarch64 && ctest --test-dir build/aarch64/kernels_c
# EDGETOK_QEMU_CPU names the processor that ctest imitates: max (all of it), neoverse-n1 (dot products), cortex-a72
# (neither dot products nor matrix instructions).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)

set(EDGETOK_QEMU_CPU max CACHE STRING "processor that qemu-aarch64 imitates when ctest runs the C tests")
find_program(EDGETOK_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(EDGETOK_QEMU)
  # The processor is part of the command, so that nothing from the environment can raise what a test means to cap.
  set(CMAKE_CROSSCOMPILING_EMULATOR ${EDGETOK_QEMU};-L;/usr/aarch64-linux-gnu;-cpu;${EDGETOK_QEMU_CPU}
    -E;EDGETOK_EMULATED=1)
endif()

set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
