// The words on a test program's command line that are no options. The first one names a test case to run alone, also
// one marked to be skipped (`op_test bench`); that case may read the rest.
#pragma once
#include <string>
#include <vector>

const std::vector<std::string>& test_arguments();
