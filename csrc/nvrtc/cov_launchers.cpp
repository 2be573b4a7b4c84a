// Apart from the others, whose tiles have the same names.
#include "../cuda/cov_accumulate.cu"
