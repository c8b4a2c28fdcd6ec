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

enum {{ PIXELS = {pixels} }};

static uint8_t arena[{arena}];
static int16_t patches[{patches}];
static int16_t unpacked[{weights}];
static int32_t totals[{totals}];

{constants}

static int32_t clip(int32_t value, int32_t low, int32_t high) {{
    return value < low ? low : value > high ? high : value;
}}

/* Codes of bits, those of an output after each other, times each output's factor. */
static void unpack(const uint32_t *packed, int bits, const int16_t *factor, int outs, int taps) {{
    const uint32_t mask = (1u << bits) - 1u, half = 1u << (bits - 1);
    int16_t *target = unpacked;
    size_t position = 0;
    for (int o = 0; o < outs; o++) {{
        for (int k = 0; k < taps; k++, position += (size_t)bits) {{
            const uint32_t *word = packed + position / 32;
            const uint64_t two = (uint64_t)word[0] | (uint64_t)word[1] << 32;
            const uint32_t code = (uint32_t)(two >> position % 32) & mask;
            *target++ = (int16_t)(((int32_t)(code ^ half) - (int32_t)half) * factor[o]);
        }}
    }}
}}

/* What lies under a kernel whose corner is at top and left; zero outside. */
static void gather(const uint8_t *x, int height, int width, int channels, int zero, int top, int left,
                   int kernel_height, int kernel_width, int16_t *patch) {{
    for (int i = top; i < top + kernel_height; i++) {{
        for (int j = left; j < left + kernel_width; j++, patch += channels) {{
            if (i < 0 || i >= height || j < 0 || j >= width) {{
                memset(patch, 0, sizeof(int16_t) * (size_t)channels);
                continue;
            }}
            const uint8_t *from = x + ((size_t)i * (size_t)width + (size_t)j) * (size_t)channels;
            for (int c = 0; c < channels; c++) {{
                patch[c] = (int16_t)(from[c] - zero);
            }}
        }}
    }}
}}

/* Sums of one output at PIXELS places; a sum of products in a row is what compilers have an instruction for. */
static void sums(const int16_t *restrict x, int taps, const int16_t *restrict w, int32_t *restrict total, int outs) {{
    const int16_t *y = x + taps, *z = y + taps, *v = z + taps;
    int32_t a = 0, b = 0, c = 0, d = 0;
    for (int k = 0; k < taps; k++) {{
        a += x[k] * w[k];
        b += y[k] * w[k];
        c += z[k] * w[k];
        d += v[k] * w[k];
    }}
    total[0] = a;
    total[outs] = b;
    total[2 * outs] = c;
    total[3 * outs] = d;
}}

static void to_codes(const int32_t *restrict total, const int32_t *restrict bias, const float *restrict multiplier,
                     int outs, int low, int high, int zero, uint8_t *restrict codes) {{
    for (int o = 0; o < outs; o++) {{
        float value = (float)(total[o] + bias[o]) * multiplier[o];
        value = value < (float)low ? (float)low : value > (float)high ? (float)high : value;
        /* To the nearest integer, ties to even: the sum has no bits for fractions. */
        value = (value + 12582912.0f) - 12582912.0f;
        codes[o] = (uint8_t)((int32_t)value + zero);
    }}
}}

static void to_values(const int32_t *restrict total, const int32_t *restrict bias, const float *restrict multiplier,
                      int outs, float *restrict values) {{
    for (int o = 0; o < outs; o++) {{
        values[o] = (float)(total[o] + bias[o]) * multiplier[o];
    }}
}}

static void conv(const uint8_t *x, int height, int width, int channels, int zero, const uint32_t *packed, int bits,
                 const int16_t *factor, const int32_t *bias, const float *multiplier, int kernel_height,
                 int kernel_width, int stride_height, int stride_width, int pad_height, int pad_width, int out_height,
                 int out_width, int outs, int low, int high, int out_zero, uint8_t *codes, float *values) {{
    const int taps = kernel_height * kernel_width * channels;
    unpack(packed, bits, factor, outs, taps);
    for (int i = 0; i < out_height; i++) {{
        for (int j = 0; j < out_width; j += PIXELS) {{
            for (int p = 0; p < PIXELS; p++) {{
                const int column = j + p < out_width ? j + p : out_width - 1;
                gather(x, height, width, channels, zero, i * stride_height - pad_height,
                       column * stride_width - pad_width, kernel_height, kernel_width,
                       patches + (size_t)p * (size_t)taps);
            }}
            for (int o = 0; o < outs; o++) {{
                sums(patches, taps, unpacked + (size_t)o * (size_t)taps, totals + o, outs);
            }}
            for (int p = 0; p < PIXELS && j + p < out_width; p++) {{
                const size_t place = ((size_t)i * (size_t)out_width + (size_t)(j + p)) * (size_t)outs;
                const int32_t *total = totals + (size_t)p * (size_t)outs;
                if (values != NULL) {{
                    to_values(total, bias, multiplier, outs, values + place);
                }} else {{
                    to_codes(total, bias, multiplier, outs, low, high, out_zero, codes + place);
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
