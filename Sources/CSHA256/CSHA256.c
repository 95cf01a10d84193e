#include "CSHA256.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>

enum { BLOCK = 64, LANES = 16, PAIR = 2 };

static const uint32_t start[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static const uint32_t rounds[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* The block that ends a message of whole blocks. */
static void pad(uint8_t block[BLOCK], size_t length) {
    uint64_t bits = (uint64_t)length * 8;
    memset(block, 0, BLOCK);
    block[0] = 0x80;
    for (int index = 0; index < 8; index++) block[BLOCK - 1 - index] = (uint8_t)(bits >> (8 * index));
}

static void put(unsigned char *digest, int index, uint32_t word) {
    word = __builtin_bswap32(word);
    memcpy(digest + 4 * index, &word, 4);
}

/* ---- Sixteen messages, each in a lane of the 512-bit registers. */

#define WIDE __attribute__((target("avx512f,avx512bw")))
#define WIDE_INLINE WIDE static inline __attribute__((always_inline))

typedef uint32_t lanes __attribute__((vector_size(64)));

#define XOR3(a, b, c) ((lanes)_mm512_ternarylogic_epi32((a), (b), (c), 0x96))
#define CHOOSE(a, b, c) ((lanes)_mm512_ternarylogic_epi32((__m512i)(a), (__m512i)(b), (__m512i)(c), 0xca))
#define MAJORITY(a, b, c) ((lanes)_mm512_ternarylogic_epi32((__m512i)(a), (__m512i)(b), (__m512i)(c), 0xe8))
#define ROTATIONS(x, i, j, k) \
    XOR3(_mm512_ror_epi32((__m512i)(x), i), _mm512_ror_epi32((__m512i)(x), j), _mm512_ror_epi32((__m512i)(x), k))
#define SHIFTED(x, i, j, k) \
    XOR3(_mm512_ror_epi32((__m512i)(x), i), _mm512_ror_epi32((__m512i)(x), j), _mm512_srli_epi32((__m512i)(x), k))

/* A block of each message comes in, a word of all messages goes out. */
WIDE_INLINE void transpose(lanes rows[LANES]) {
    __m512i pairs[LANES], fours[LANES];
    for (int index = 0; index < LANES; index += 2) {
        pairs[index] = _mm512_unpacklo_epi32((__m512i)rows[index], (__m512i)rows[index + 1]);
        pairs[index + 1] = _mm512_unpackhi_epi32((__m512i)rows[index], (__m512i)rows[index + 1]);
    }
    for (int index = 0; index < LANES; index += 4) {
        fours[index] = _mm512_unpacklo_epi64(pairs[index], pairs[index + 2]);
        fours[index + 1] = _mm512_unpackhi_epi64(pairs[index], pairs[index + 2]);
        fours[index + 2] = _mm512_unpacklo_epi64(pairs[index + 1], pairs[index + 3]);
        fours[index + 3] = _mm512_unpackhi_epi64(pairs[index + 1], pairs[index + 3]);
    }
    for (int column = 0; column < 4; column++) {
        __m512i a = _mm512_shuffle_i32x4(fours[column], fours[4 + column], 0x88);
        __m512i b = _mm512_shuffle_i32x4(fours[column], fours[4 + column], 0xdd);
        __m512i c = _mm512_shuffle_i32x4(fours[8 + column], fours[12 + column], 0x88);
        __m512i d = _mm512_shuffle_i32x4(fours[8 + column], fours[12 + column], 0xdd);
        rows[column] = (lanes)_mm512_shuffle_i32x4(a, c, 0x88);
        rows[4 + column] = (lanes)_mm512_shuffle_i32x4(b, d, 0x88);
        rows[8 + column] = (lanes)_mm512_shuffle_i32x4(a, c, 0xdd);
        rows[12 + column] = (lanes)_mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

WIDE static void wide_blocks(lanes state[8], const uint8_t *const messages[LANES], size_t length) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203));
    lanes a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
    for (size_t offset = 0; offset < length; offset += BLOCK) {
        lanes w[LANES];
        for (int index = 0; index < LANES; index++) {
            w[index] = (lanes)_mm512_shuffle_epi8(_mm512_loadu_si512(messages[index] + offset), order);
        }
        transpose(w);
        lanes saved[8] = {a, b, c, d, e, f, g, h};
#pragma clang loop unroll(full)
        for (int round = 0; round < 64; round++) {
            if (round >= 16) {
                w[round & 15] += w[(round + 9) & 15] + SHIFTED(w[(round + 1) & 15], 7, 18, 3) + SHIFTED(w[(round + 14) & 15], 17, 19, 10);
            }
            lanes first = h + w[round & 15] + (lanes)_mm512_set1_epi32((int)rounds[round]) + CHOOSE(e, f, g) + ROTATIONS(e, 6, 11, 25);
            lanes second = MAJORITY(a, b, c) + ROTATIONS(a, 2, 13, 22);
            h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
        }
        a += saved[0], b += saved[1], c += saved[2], d += saved[3], e += saved[4], f += saved[5], g += saved[6], h += saved[7];
    }
    state[0] = a, state[1] = b, state[2] = c, state[3] = d, state[4] = e, state[5] = f, state[6] = g, state[7] = h;
}

WIDE static void wide_hash(const uint8_t *const *messages, size_t length, unsigned char *digests) {
    uint8_t end[BLOCK];
    const uint8_t *ends[LANES];
    lanes state[8];
    pad(end, length);
    for (int lane = 0; lane < LANES; lane++) ends[lane] = end;
    for (int index = 0; index < 8; index++) state[index] = (lanes)_mm512_set1_epi32((int)start[index]);
    wide_blocks(state, messages, length);
    wide_blocks(state, ends, BLOCK);
    for (int lane = 0; lane < LANES; lane++) {
        for (int index = 0; index < 8; index++) put(digests + 32 * lane, index, state[index][lane]);
    }
}

/* ---- Two messages in turns, by the instructions that are made for it. */

#define PAIRED __attribute__((target("sha,sse4.1,ssse3")))

/* The state in the order of sha256rnds2: a, b, e, f and c, d, g, h, the first one highest. */
typedef struct {
    __m128i abef, cdgh;
} pair_state;

PAIRED static void pair_blocks(pair_state states[PAIR], const uint8_t *const messages[PAIR], size_t length) {
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    pair_state now[PAIR] = {states[0], states[1]};
    for (size_t offset = 0; offset < length; offset += BLOCK) {
        pair_state saved[PAIR] = {now[0], now[1]};
        __m128i w[PAIR][4];
        for (int one = 0; one < PAIR; one++) {
            for (int index = 0; index < 4; index++) {
                w[one][index] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(messages[one] + offset) + index), order);
            }
        }
#pragma clang loop unroll(full)
        for (int four = 0; four < 16; four++) {
            const __m128i constants = _mm_load_si128((const __m128i *)rounds + four);
#pragma clang loop unroll(full)
            for (int one = 0; one < PAIR; one++) {
                __m128i *words = w[one];
                if (four >= 4) {
                    __m128i sum = _mm_sha256msg1_epu32(words[four & 3], words[(four + 1) & 3]);
                    sum = _mm_add_epi32(sum, _mm_alignr_epi8(words[(four + 3) & 3], words[(four + 2) & 3], 4));
                    words[four & 3] = _mm_sha256msg2_epu32(sum, words[(four + 3) & 3]);
                }
                __m128i sum = _mm_add_epi32(words[four & 3], constants);
                now[one].cdgh = _mm_sha256rnds2_epu32(now[one].cdgh, now[one].abef, sum);
                now[one].abef = _mm_sha256rnds2_epu32(now[one].abef, now[one].cdgh, _mm_shuffle_epi32(sum, 0x0e));
            }
        }
        for (int one = 0; one < PAIR; one++) {
            now[one].abef = _mm_add_epi32(now[one].abef, saved[one].abef);
            now[one].cdgh = _mm_add_epi32(now[one].cdgh, saved[one].cdgh);
        }
    }
    states[0] = now[0], states[1] = now[1];
}

PAIRED static void pair_hash(const uint8_t *const *messages, size_t length, unsigned char *digests) {
    uint8_t end[BLOCK];
    const uint8_t *const ends[PAIR] = {end, end};
    pair_state states[PAIR];
    pad(end, length);
    for (int one = 0; one < PAIR; one++) {
        states[one].abef = _mm_set_epi32((int)start[0], (int)start[1], (int)start[4], (int)start[5]);
        states[one].cdgh = _mm_set_epi32((int)start[2], (int)start[3], (int)start[6], (int)start[7]);
    }
    pair_blocks(states, messages, length);
    pair_blocks(states, ends, BLOCK);
    for (int one = 0; one < PAIR; one++) {
        static const int places[8] = {3, 2, 7, 6, 1, 0, 5, 4};
        uint32_t words[8];
        _mm_storeu_si128((__m128i *)words, states[one].abef);
        _mm_storeu_si128((__m128i *)words + 1, states[one].cdgh);
        for (int index = 0; index < 8; index++) put(digests + 32 * one, index, words[places[index]]);
    }
}

/* ---- What there is. */

/* Whether the system keeps such registers when it changes threads (XCR0). */
static int keeps(uint32_t registers) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers;
}

int xd_sha256_width(int way) {
    unsigned a, b, c, d, wide, sse;
    if (!__get_cpuid(1, &a, &b, &sse, &d) || !__get_cpuid_count(7, 0, &a, &wide, &c, &d)) return 0;
    switch (way) {
    case XD_SHA256_AVX512:
        /* OSXSAVE; AVX512F and AVX512BW; the registers of SSE, AVX and AVX-512. */
        return (sse & (1u << 27)) && (wide & (1u << 16)) && (wide & (1u << 30)) && keeps(0xe6) ? LANES : 0;
    case XD_SHA256_SHANI:
        /* SSSE3 and SSE4.1; SHA. */
        return (sse & (1u << 9)) && (sse & (1u << 19)) && (wide & (1u << 29)) ? PAIR : 0;
    default: return 0;
    }
}

void xd_sha256_hash(int way, const void *const *messages, size_t length, unsigned char *digests) {
    const uint8_t *const *bytes = (const uint8_t *const *)messages;
    if (way == XD_SHA256_AVX512) {
        wide_hash(bytes, length, digests);
    } else {
        pair_hash(bytes, length, digests);
    }
}

#else

int xd_sha256_width(int way) { return 0; }

void xd_sha256_hash(int way, const void *const *messages, size_t length, unsigned char *digests) {}

#endif
