# The flags table: which kernel files this processor builds, and the compile flags of each.
#
#   agq_add_kernels(<target>)   adds cpp/kernels/*/*.cpp to the target
#
# Flags for instruction sets go on kernel files only, and these are never built with link-time optimization or -ffast-math:
# the rest of the program must run on every CPU, and NaN must stay NaN.

function(agq_kernel target file flags flags_msvc)
    set(path "${PROJECT_SOURCE_DIR}/cpp/kernels/${file}")
    if(MSVC AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
        set(flags "${flags_msvc}")
    else()
        # -O3 unrolls the loops over tokens, without which their accumulators would not stay in registers.
        set(flags -O3 -fno-lto -fno-fast-math ${flags})
    endif()
    set_source_files_properties("${path}" PROPERTIES COMPILE_OPTIONS "${flags}")
    target_sources(${target} PRIVATE "${path}")
endfunction()

function(agq_add_kernels target)
    # Universal macOS builds and cross builds name the target here; otherwise it is the machine's own.
    string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
    if(APPLE AND CMAKE_OSX_ARCHITECTURES)
        string(TOLOWER "${CMAKE_OSX_ARCHITECTURES}" processor)
    endif()

    # The attention kernels are written with vector types that MSVC does not have; the host's attention serves there.
    set(vector_types TRUE)
    if(MSVC AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
        set(vector_types FALSE)
    endif()

    agq_kernel(${target} portable/scalar.cpp "" "")
    # -fno-math-errno lets square roots be instructions, and -fno-trapping-math comparisons be selections; neither changes
    # a result.
    set(rows "-fno-math-errno;-fno-trapping-math")
    agq_kernel(${target} portable/rows_generic.cpp "${rows}" "/fp:precise")
    # Without fused multiply-adds, which not all have, the converter rounds alike on all processors.
    set(rounding "${rows};-ffp-contract=off")
    agq_kernel(${target} portable/rounding_generic.cpp "${rounding}" "/fp:precise")
    if(vector_types)
        agq_kernel(${target} portable/attention_generic.cpp "" "")
        agq_kernel(${target} portable/attention_paper.cpp "-fno-math-errno" "")
        agq_kernel(${target} portable/softmax_weights_generic.cpp "" "")
    endif()
    if(processor MATCHES "^(x86_64|amd64|x64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
        agq_kernel(${target} x86/avx2.cpp "-mavx2;-mfma;-mf16c" "/arch:AVX2")
        agq_kernel(${target} x86/avxvnni.cpp "-mavx2;-mfma;-mf16c" "/arch:AVX2")
        agq_kernel(${target} x86/avx512vnni.cpp
                   "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512"
                   "/arch:AVX512")
        agq_kernel(${target} x86/rows_avx2.cpp "-mavx2;-mfma;${rows}" "/arch:AVX2;/fp:precise")
        agq_kernel(${target} x86/rounding_avx2.cpp "-mavx2;${rounding}" "/arch:AVX2;/fp:precise")
        agq_kernel(${target} x86/rows_avx512.cpp
                   "-mavx2;-mfma;-mavx512f;-mavx512bw;-mavx512vl;-mprefer-vector-width=512;${rows}"
                   "/arch:AVX512;/fp:precise")
        agq_kernel(${target} x86/rounding_avx512.cpp
                   "-mavx2;-mavx512f;-mavx512bw;-mavx512vl;-mprefer-vector-width=512;${rounding}"
                   "/arch:AVX512;/fp:precise")
        if(vector_types)
            agq_kernel(${target} x86/attention_avx2.cpp "-mavx2;-mfma;-mf16c" "")
            agq_kernel(${target} x86/softmax_weights_avx2.cpp "-mavx2;-mfma;-mf16c" "")
            agq_kernel(${target} x86/softmax_weights_avx512.cpp
                       "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mprefer-vector-width=512" "")
            agq_kernel(${target} x86/attention_few_avx512.cpp
                       "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mprefer-vector-width=512" "")
            agq_kernel(${target} x86/attention_avx512vnni.cpp
                       "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512vl;-mavx512vnni;-mprefer-vector-width=512" "")
        endif()
    elseif(processor MATCHES "^(aarch64|arm64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
        # MSVC offers the intrinsics without flags. GCC's scheduler before register allocation moves so many loads ahead
        # that accumulators are spilled: up to a quarter more instructions.
        set(order "")
        if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
            set(order -fno-schedule-insns)
        endif()
        agq_kernel(${target} arm/neon.cpp "${order}" "")
        agq_kernel(${target} arm/neon_dotprod.cpp "-march=armv8.2-a+dotprod;${order}" "")
        agq_kernel(${target} arm/neon_i8mm.cpp "-march=armv8.2-a+dotprod+i8mm;${order}" "")
        if(vector_types)
            agq_kernel(${target} arm/attention_neon.cpp "" "")
        endif()
    endif()
    target_sources(${target} PRIVATE "${PROJECT_SOURCE_DIR}/cpp/kernels/select.cpp")
endfunction()
