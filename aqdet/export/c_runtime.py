"""The fixed parts of :mod:`aqdet.export.c_source`: loops over codes, in C99."""

HEADER = """\
/* A quantized object detector: a {height}x{width} image to predictions, as model.onnx computes them. */
#ifndef DETECTOR_H
#define DETECTOR_H

#include <stdint.h>

enum {{ DETECTOR_HEIGHT = {height}, DETECTOR_WIDTH = {width} }};

/* (height, width, channels) each; decoding and thresholds: see detector.json. */
typedef struct {{
{members}
}} detector_outputs;

/* image: height x width x 3 bytes, the channels in the order of input.format of detector.json. Not reentrant. */
void detector_run(const uint8_t *image, detector_outputs *outputs);

#endif
"""

KERNELS = """\
/* Integers throughout, but for a sum's float32 multiplier. Values: a code plus its zero point, (height, width,
   channels). Compile with optimization (gcc -std=c99 -O3), and never with -ffast-math. */
#include "detector.h"

#include <float.h>
#include <limits.h>
#include <stddef.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "the codes are those of the shipped model only without -ffast-math"
#endif
#if INT_MAX < 2147483647
#error "int has to have 32 bits"
#endif
#if FLT_EVAL_METHOD != 0
#error "float has to be computed as float: on 32-bit x86 add -msse2 -mfpmath=sse"
#endif

enum {{ LANES = {lanes}, PIXELS = {pixels} }};

static uint8_t arena[{arena}];
static int16_t padded[{padded}];
static int16_t unpacked[{weights}];

{constants}

static int32_t clip(int32_t value, int32_t low, int32_t high) {{
    return value < low ? low : value > high ? high : value;
}}

/* Codes of bits, pairs of channels for all outputs as they are read, times each output's factor. */
static void unpack(const uint32_t *packed, int bits, const int16_t *factor, int outs, int lanes, int pairs) {{
    const uint32_t mask = (1u << bits) - 1u, half = 1u << (bits - 1);
    int16_t *target = unpacked;
    size_t position = 0;
    if (lanes != outs) {{
        memset(unpacked, 0, sizeof(int16_t) * 2 * (size_t)pairs * (size_t)lanes);
    }}
    for (int pair = 0; pair < pairs; pair++, target += 2 * lanes) {{
        for (int i = 0; i < 2 * outs; i++, position += (size_t)bits) {{
            const uint32_t *word = packed + position / 32;
            const uint64_t two = (uint64_t)word[0] | (uint64_t)word[1] << 32;
            const uint32_t code = (uint32_t)(two >> position % 32) & mask;
            target[i] = (int16_t)(((int32_t)(code ^ half) - (int32_t)half) * factor[i / 2]);
        }}
    }}
}}

static void pad(const uint8_t *x, int height, int width, int channels, int zero, int vertical, int horizontal) {{
    const int pairs = channels + channels % 2;
    const size_t row = (size_t)(width + 2 * horizontal) * (size_t)pairs;
    if (vertical || horizontal || pairs != channels) {{
        memset(padded, 0, sizeof(int16_t) * (size_t)(height + 2 * vertical) * row);
    }}
    for (int i = 0; i < height; i++) {{
        int16_t *target = padded + (size_t)(i + vertical) * row + (size_t)(horizontal * pairs);
        for (int j = 0; j < width; j++, x += channels, target += pairs) {{
            for (int c = 0; c < channels; c++) {{
                target[c] = (int16_t)(x[c] - zero);
            }}
        }}
    }}
}}

/* Sums of LANES outputs at PIXELS places of a row. */
static void sums(const int16_t *restrict x, size_t row, size_t step, int rows, int taps, const int16_t *restrict w,
                 size_t lanes, int32_t total[PIXELS][LANES]) {{
    int32_t sum[PIXELS][LANES] = {{{{0}}}};
    for (int i = 0; i < rows; i++, x += row) {{
        for (int k = 0; k < taps; k += 2, w += 2 * lanes) {{
            for (size_t p = 0; p < PIXELS; p++) {{
                const int16_t first = x[p * step + (size_t)k], second = x[p * step + (size_t)k + 1];
                for (size_t o = 0; o < LANES; o++) {{
                    sum[p][o] += (int32_t)first * w[2 * o] + (int32_t)second * w[2 * o + 1];
                }}
            }}
        }}
    }}
    memcpy(total, sum, sizeof sum);
}}

static void conv(const uint8_t *x, int height, int width, int channels, int zero, const uint32_t *packed, int bits,
                 const int16_t *factor, const int32_t *bias, const float *multiplier, int kernel_height,
                 int kernel_width, int stride_height, int stride_width, int pad_height, int pad_width, int out_height,
                 int out_width, int outs, int low, int high, int out_zero, uint8_t *codes, float *values) {{
    const int lanes = (outs + LANES - 1) / LANES * LANES, pairs = channels + channels % 2;
    const size_t row = (size_t)(width + 2 * pad_width) * (size_t)pairs;
    const size_t step = (size_t)stride_width * (size_t)pairs;
    unpack(packed, bits, factor, outs, lanes, kernel_height * kernel_width * pairs / 2);
    pad(x, height, width, channels, zero, pad_height, pad_width);
    for (int i = 0; i < out_height; i++) {{
        for (int j = 0; j < out_width; j += PIXELS) {{
            const int16_t *from = padded + (size_t)(i * stride_height) * row + (size_t)j * step;
            const int pixels = out_width - j < PIXELS ? out_width - j : PIXELS;
            for (int first = 0; first < outs; first += LANES) {{
                const int count = outs - first < LANES ? outs - first : LANES;
                int32_t total[PIXELS][LANES];
                sums(from, row, step, kernel_height, kernel_width * pairs, unpacked + 2 * (size_t)first, (size_t)lanes,
                     total);
                for (int p = 0; p < pixels; p++) {{
                    const size_t pixel = (size_t)i * (size_t)out_width + (size_t)(j + p);
                    const size_t place = pixel * (size_t)outs + (size_t)first;
                    for (int o = 0; o < count; o++) {{
                        float value = (float)(total[p][o] + bias[first + o]) * multiplier[first + o];
                        if (values != NULL) {{
                            values[place + (size_t)o] = value;
                            continue;
                        }}
                        value = value < (float)low ? (float)low : value > (float)high ? (float)high : value;
                        /* To the nearest integer, ties to even: the sum has no bits for fractions. */
                        value = (value + 12582912.0f) - 12582912.0f;
                        codes[place + (size_t)o] = (uint8_t)((int32_t)value + out_zero);
                    }}
                }}
            }}
        }}
    }}
}}

static void pad_image(const uint8_t *x, int height, int width, int vertical, int horizontal, const uint8_t *values,
                      uint8_t *y) {{
    for (int i = -vertical; i < height + vertical; i++) {{
        for (int j = -horizontal; j < width + horizontal; j++, y += 3) {{
            const int inside = i >= 0 && i < height && j >= 0 && j < width;
            memcpy(y, inside ? x + 3 * ((size_t)i * (size_t)width + (size_t)j) : values, 3);
        }}
    }}
}}

static void look_up(const uint8_t *x, int count, const uint8_t *table, uint8_t *y) {{
    for (int i = 0; i < count; i++) {{
        y[i] = table[x[i]];
    }}
}}

static void add(const uint8_t *a, const uint8_t *b, int count, int zero_a, int zero_b, int multiplier_a,
                int multiplier_b, int shift, int low, int high, int out_zero, uint8_t *y) {{
    /* A multiple of 2^shift above every sum, since a shift of a negative number is up to the compiler. */
    const int32_t offset = (1 << 24) + (1 << (shift - 1)), back = 1 << (24 - shift);
    for (int i = 0; i < count; i++) {{
        const int32_t sum = (a[i] - zero_a) * multiplier_a + (b[i] - zero_b) * multiplier_b;
        y[i] = (uint8_t)(clip(((sum + offset) >> shift) - back, low, high) + out_zero);
    }}
}}

static void max_pool(const uint8_t *x, int height, int width, int channels, int kernel, int stride, int padding,
                     int out_height, int out_width, uint8_t *y) {{
    for (int i = 0; i < out_height; i++) {{
        for (int j = 0; j < out_width; j++, y += channels) {{
            memset(y, 0, (size_t)channels);
            for (int r = i * stride - padding; r < i * stride - padding + kernel; r++) {{
                for (int s = j * stride - padding; s < j * stride - padding + kernel; s++) {{
                    if (r < 0 || r >= height || s < 0 || s >= width) {{
                        continue;
                    }}
                    const uint8_t *from = x + ((size_t)r * (size_t)width + (size_t)s) * (size_t)channels;
                    for (int c = 0; c < channels; c++) {{
                        y[c] = from[c] > y[c] ? from[c] : y[c];
                    }}
                }}
            }}
        }}
    }}
}}

static void upsample(const uint8_t *x, int height, int width, int channels, uint8_t *y) {{
    for (int i = 0; i < 2 * height; i++) {{
        for (int j = 0; j < 2 * width; j++, y += channels) {{
            memcpy(y, x + ((size_t)(i / 2) * (size_t)width + (size_t)(j / 2)) * (size_t)channels, (size_t)channels);
        }}
    }}
}}

void detector_run(const uint8_t *image, detector_outputs *outputs) {{
{calls}
}}
"""
