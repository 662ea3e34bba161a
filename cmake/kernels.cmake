# Which kernel files are built, and with which flags.
#
#   agq_add_kernels()   defines the target agq_kernels, which brings the objects of all kernels to whoever links it
#
# There is one object library for each instruction set. It carries the flags, so the files in cpp/kernels/portable/ are
# compiled once for each. No kernel is built with link-time optimization or -ffast-math: the rest of the program must
# run on every CPU, and NaN must stay NaN.

if(MSVC AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    set(AGQ_IS_MSVC TRUE)
else()
    set(AGQ_IS_MSVC FALSE)
endif()

# agq_isa(<name> [VECTOR <floats of a register> TILE <registers of a tile row>] [FLAGS ...] [MSVC_FLAGS ...]
#         FILES ... [VECTOR_FILES ...])
# FILES are those of cpp/kernels/ that are compiled for this instruction set. VECTOR_FILES are written with vector types
# that MSVC does not have; there, the host's attention serves.
function(agq_isa name)
    cmake_parse_arguments(PARSE_ARGV 1 isa "" "VECTOR;TILE" "FLAGS;MSVC_FLAGS;FILES;VECTOR_FILES")
    if(NOT AGQ_IS_MSVC)
        list(APPEND isa_FILES ${isa_VECTOR_FILES})
    endif()
    list(TRANSFORM isa_FILES PREPEND "${PROJECT_SOURCE_DIR}/cpp/kernels/")
    add_library(agq_${name} OBJECT ${isa_FILES})
    target_compile_definitions(agq_${name} PRIVATE AGQ_ISA=${name})
    if(isa_VECTOR)
        target_compile_definitions(agq_${name} PRIVATE AGQ_VECTOR=${isa_VECTOR} AGQ_TILE_COLUMNS=${isa_TILE})
    endif()
    if(AGQ_IS_MSVC)
        target_compile_options(agq_${name} PRIVATE /fp:precise ${isa_MSVC_FLAGS})
    else()
        # -O3 unrolls the loops over tokens, without which their accumulators would not stay in registers.
        target_compile_options(agq_${name} PRIVATE -O3 -fno-lto -fno-fast-math ${isa_FLAGS})
    endif()
    target_sources(agq_kernels INTERFACE $<TARGET_OBJECTS:agq_${name}>)
endfunction()

# Flags that a file needs whatever it is compiled for.
function(agq_file_flags file)
    if(NOT AGQ_IS_MSVC)
        set_source_files_properties("${PROJECT_SOURCE_DIR}/cpp/kernels/${file}" PROPERTIES COMPILE_OPTIONS "${ARGN}")
    endif()
endfunction()

function(agq_add_kernels)
    # Universal macOS builds and cross builds name the target here; otherwise it is the machine's own.
    string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
    if(APPLE AND CMAKE_OSX_ARCHITECTURES)
        string(TOLOWER "${CMAKE_OSX_ARCHITECTURES}" processor)
    endif()

    # -fno-math-errno lets square roots be instructions, and -fno-trapping-math comparisons be selections; neither changes
    # a result.
    agq_file_flags(portable/rows.cpp -fno-math-errno -fno-trapping-math)
    # Without fused multiply-adds, which not all have, the converter rounds alike on all processors.
    foreach(file rounding grid_rounding)
        agq_file_flags(portable/${file}.cpp -fno-math-errno -fno-trapping-math -ffp-contract=off)
    endforeach()
    agq_file_flags(portable/attention_paper.cpp -fno-math-errno)
    # A product and the sum that rounds it must not become one operation.
    agq_file_flags(portable/q8_pack.cpp -ffp-contract=off)
    # They write their fused operations themselves: which others are fused would differ from tile to tile.
    foreach(file attention_avx512vnni attention_256)
        agq_file_flags(x86/${file}.cpp -ffp-contract=off)
    endforeach()
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        # GCC's scheduler before register allocation moves so many loads ahead that accumulators are spilled: up to a
        # quarter more instructions.
        foreach(kernel neon neon_dotprod neon_i8mm)
            agq_file_flags(arm/${kernel}.cpp -fno-schedule-insns)
        endforeach()
    endif()

    add_library(agq_kernels OBJECT "${PROJECT_SOURCE_DIR}/cpp/kernels/select.cpp")
    set(rows_and_rounding portable/rows.cpp portable/rounding.cpp portable/grid_rounding.cpp)
    set(few portable/attention_few.cpp portable/softmax_weights.cpp)
    agq_isa(generic VECTOR 4 TILE 2 FILES portable/scalar.cpp ${rows_and_rounding}
            VECTOR_FILES portable/attention.cpp portable/attention_paper.cpp ${few})
    if(processor MATCHES "^(x86_64|amd64|x64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
        # The accumulators of a tile of 6 rows fill 12 of 16 registers with AVX2, and 24 of 32 with AVX-512.
        set(avx2 -mavx2 -mfma -mf16c)
        set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mprefer-vector-width=512)
        agq_isa(avx2 VECTOR 8 TILE 2 FLAGS ${avx2} MSVC_FLAGS /arch:AVX2
                FILES x86/avx2.cpp portable/q8_pack.cpp ${rows_and_rounding}
                VECTOR_FILES x86/attention_256.cpp ${few})
        agq_isa(avxvnni VECTOR 8 TILE 2 FLAGS ${avx2} -DAGQ_WITH_AVXVNNI MSVC_FLAGS /arch:AVX2
                FILES x86/avxvnni.cpp VECTOR_FILES x86/attention_256.cpp)
        agq_isa(avx512vnni VECTOR 16 TILE 4 FLAGS ${avx512} MSVC_FLAGS /arch:AVX512
                FILES x86/avx512vnni.cpp
                      x86/q8_avx512vnni.cpp
                      portable/q8_pack.cpp
                      ${rows_and_rounding}
                VECTOR_FILES x86/attention_avx512vnni.cpp ${few})
    elseif(processor MATCHES "^(aarch64|arm64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
        # MSVC offers the intrinsics without flags. `generic` is built for NEON already, but for the size of tiles.
        agq_isa(neon VECTOR 4 TILE 4 FILES arm/neon.cpp VECTOR_FILES portable/attention.cpp ${few})
        agq_isa(neon_dotprod FLAGS -march=armv8.2-a+dotprod FILES arm/neon_dotprod.cpp)
        agq_isa(neon_i8mm FLAGS -march=armv8.2-a+dotprod+i8mm FILES arm/neon_i8mm.cpp)
    endif()
endfunction()
