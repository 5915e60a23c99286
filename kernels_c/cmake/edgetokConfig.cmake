# find_package(edgetok): the target edgetok::edgetok.
include("${CMAKE_CURRENT_LIST_DIR}/edgetokTargets.cmake")
