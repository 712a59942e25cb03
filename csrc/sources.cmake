# The sources of the kernel families, read from scan_fast/ops/families.json, and how the CPU sources are compiled.
# Included by the module's CMakeLists.txt and by csrc/tests/CMakeLists.txt.

set(SCAN_FAST_CSRC ${CMAKE_CURRENT_LIST_DIR})
set(SCAN_FAST_FAMILIES_FILE ${SCAN_FAST_CSRC}/../scan_fast/ops/families.json)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${SCAN_FAST_FAMILIES_FILE})
file(READ ${SCAN_FAST_FAMILIES_FILE} SCAN_FAST_FAMILIES_JSON)

# SCAN_FAST_FAMILIES: the names of all families.
set(SCAN_FAST_FAMILIES "")
string(JSON last LENGTH "${SCAN_FAST_FAMILIES_JSON}")
math(EXPR last "${last} - 1")
foreach(index RANGE ${last})
  string(JSON name MEMBER "${SCAN_FAST_FAMILIES_JSON}" ${index})
  list(APPEND SCAN_FAST_FAMILIES ${name})
endforeach()

# scan_fast_json_list(<variable> <key>...): the strings of a list in families.json; empty if there is none.
function(scan_fast_json_list variable)
  set(values "")
  string(JSON count ERROR_VARIABLE missing LENGTH "${SCAN_FAST_FAMILIES_JSON}" ${ARGN})
  if(NOT missing AND count GREATER 0)
    math(EXPR last "${count} - 1")
    foreach(index RANGE ${last})
      string(JSON value GET "${SCAN_FAST_FAMILIES_JSON}" ${ARGN} ${index})
      list(APPEND values ${value})
    endforeach()
  endif()
  set(${variable} ${values} PARENT_SCOPE)
endfunction()

# scan_fast_family_sources(<variable> <family> <role>...): absolute paths; the roles are those of ops/families.py.
function(scan_fast_family_sources variable family)
  set(paths "")
  foreach(role IN LISTS ARGN)
    scan_fast_json_list(files ${family} sources ${role})
    list(TRANSFORM files PREPEND ${SCAN_FAST_CSRC}/${family}/)
    list(APPEND paths ${files})
  endforeach()
  set(${variable} ${paths} PARENT_SCOPE)
endfunction()

# scan_fast_sources(<variable> <role>...): the same for all families together.
function(scan_fast_sources variable)
  set(paths "")
  foreach(family IN LISTS SCAN_FAST_FAMILIES)
    scan_fast_family_sources(of_family ${family} ${ARGN})
    list(APPEND paths ${of_family})
  endforeach()
  set(${variable} ${paths} PARENT_SCOPE)
endfunction()

# Instruction sets that the `isa` sources are compiled for, each time into namespace scan_fast::<isa> (macro
# SCAN_FAST_ISA); common/cpu_features.h chooses at run time.
set(SCAN_FAST_ISAS baseline)
set(SCAN_FAST_FLAGS_baseline "")
set(SCAN_FAST_FLAGS_amx "")
set(SCAN_FAST_FLAGS_amx_avx512 "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND SCAN_FAST_ISAS avx2 avx512)
  set(SCAN_FAST_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(SCAN_FAST_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl ${SCAN_FAST_FLAGS_avx2}
    -mprefer-vector-width=512)
  set(SCAN_FAST_FLAGS_amx -mamx-tile -mamx-bf16)
  set(SCAN_FAST_FLAGS_amx_avx512 ${SCAN_FAST_FLAGS_amx} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16)
endif()

# Options for compiling and linking with SCAN_FAST_SANITIZE; the first error of either sanitizer ends the program. With
# SCAN_FAST_SANITIZE_THREADS, ThreadSanitizer takes their place, because it cannot be combined with AddressSanitizer.
option(SCAN_FAST_SANITIZE_THREADS "Compile with ThreadSanitizer" OFF)
set(SCAN_FAST_SANITIZE_FLAGS "")
if(SCAN_FAST_SANITIZE_THREADS)
  set(SCAN_FAST_SANITIZE_FLAGS -fsanitize=thread -fno-omit-frame-pointer -g)
elseif(SCAN_FAST_SANITIZE)
  set(SCAN_FAST_SANITIZE_FLAGS -fsanitize=address,undefined,float-cast-overflow
    -fno-sanitize-recover=undefined,float-cast-overflow -fno-omit-frame-pointer -g)
endif()

# scan_fast_set_source_options(): gives the CPU sources the options of their family and role, in this directory.
function(scan_fast_set_source_options)
  foreach(family IN LISTS SCAN_FAST_FAMILIES)
    scan_fast_json_list(options ${family} cpu_options)
    foreach(role IN ITEMS cpu isa amx amx_avx512)
      scan_fast_family_sources(sources ${family} ${role})
      set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS ${options} ${SCAN_FAST_FLAGS_${role}})
    endforeach()
  endforeach()
  set_property(SOURCE ${SCAN_FAST_CSRC}/common/amx.cpp APPEND PROPERTY COMPILE_OPTIONS ${SCAN_FAST_FLAGS_amx})
endfunction()
