// CRC-32C (Castagnoli, RFC 3720): the checksum of the journal.
#pragma once

#include <cstdint>

namespace pymerge {

uint32_t crc32c(const void* data, int64_t bytes, uint32_t crc = 0);

// crc32c(a + b) from crc32c(a), crc32c(b) and the length of b.
uint32_t crc32c_combine(uint32_t first, uint32_t second, int64_t second_bytes);

}  // namespace pymerge
