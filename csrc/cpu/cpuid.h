// Which instruction sets this processor and this build have.
#pragma once

namespace maskdiff {

enum Level { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX_BF16 = 4 };

int best_level();

}  // namespace maskdiff
