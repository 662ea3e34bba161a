# Toolchain file: builds for 64-bit Arm Linux with Debian's cross compiler (apt-get install g++-aarch64-linux-gnu), and
# runs what it builds under qemu-user (apt-get install qemu-user).
#
#   cmake -S . -B build/arm -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake && cmake --build build/arm

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

# Headers and libraries of the target live here; programs are the build machine's own.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

find_program(AGQ_QEMU qemu-aarch64)
if(AGQ_QEMU)
    set(CMAKE_CROSSCOMPILING_EMULATOR ${AGQ_QEMU} -L /usr/aarch64-linux-gnu)
endif()
