// One batch of script.py's network on a CPU: forward pass, loss and backward pass, in float32; see docs/speed.md.
// __init__.py compiles this file, checks it against autograd, and calls run_batch().
//
// Layout. A Vector holds one pixel of LANES images, a Block all feature maps of these images, as [channel][row][column]
// in a frame of zeros, the convolutions' padding. So everything that costs time is a plain loop over whole vectors.
//
// Threads. A thread takes a block through all layers. Threads meet only where batch normalisation needs sums over the
// batch: first within each block, then over the blocks in order, so that any number of threads gives the same bits.
// Where there are two threads for each block, they share it as a team: each computes half of the channels of every map,
// and waits for the other before it reads all channels. A sum is always one thread's, so the bits stay the same.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

// LANES: the numbers in a register. TILE: the channels whose sums convolve() keeps in registers, for two pixels each.
#if defined __AVX512F__
constexpr int LANES = 16, TILE = 10;
#elif defined __AVX__
constexpr int LANES = 8, TILE = 5;
#elif defined __aarch64__
constexpr int LANES = 4, TILE = 10;
#else
constexpr int LANES = 4, TILE = 5;
#endif
constexpr bool TEAMS = LANES == 16;  // with fewer lanes, weight_gradient()'s GROUP does not divide half of a map

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Integers __attribute__((vector_size(4 * LANES)));

static inline float sum(Vector v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

// The feature maps (CHANNELS, SIDE, SIDE) of one block. Rows and columns run from -1 to SIDE: those two are the frame.
template <int CHANNELS, int SIDE>
struct Maps {
    static constexpr int channels = CHANNELS, side = SIDE, area = SIDE * SIDE;
    Vector value[CHANNELS][SIDE + 2][SIDE + 3];  // one column is spare: the last tile of an odd row reaches into it
    float mean[CHANNELS], squares[CHANNELS];  // by measure()

    Vector& operator()(int c, int h, int w) { return value[c][h + 1][w + 1]; }
};

// What a thread computes of each map: the channels from first() to end(). wait(): for the other thread of its team.
struct Part {
    int number, team;  // 0 of 1, or 0 or 1 of 2
    std::barrier<>& barrier;

    int first(const auto& z) const { return TEAMS ? z.channels * number / team : 0; }
    int end(const auto& z) const { return TEAMS ? z.channels * (number + 1) / team : z.channels; }
    void wait() const { if (team > 1) barrier.arrive_and_wait(); }
};

static inline void for_pixels(auto& z, auto work) {
    for (int h = 0; h < z.side; h++)
        for (int w = 0; w < z.side; w++) work(h, w);
}

static inline float channel_sum(auto& z, int c) {
    Vector total = {};
    for_pixels(z, [&](int h, int w) { total += z(c, h, w); });
    return sum(total);
}

// ---------------------------------------------------------------- convolution

// y = conv(x), with a weight as (out, K, K, in). The sums for SIZE channels of two neighbouring pixels stay in
// registers while all inputs are read; inlined into a caller, with its variables, they would not.
// backward: x is the gradient of that convolution's output and y that of its input. This is a convolution, too: without
// a bias, with in and out exchanged in the weight, and with the kernel rotated by 180 degrees.
template <int K, bool backward, int SIZE = TILE, class In, class Out>
[[gnu::noinline]] static void convolve(In& x, const float* weight, const float* bias, Out& y, Part part) {
    if constexpr (TEAMS && Out::channels == SIZE)  // a team has half a tile for each thread
        if (part.team > 1) return convolve<K, backward, SIZE / 2>(x, weight, bias, y, part);
    part.wait();
    for (int first = part.first(y); first < part.end(y); first += SIZE)
        for (int h = 0; h < Out::side; h++)
            for (int w = 0; w < Out::side; w += 2) {
                Vector left[SIZE] = {}, right[SIZE] = {};
                for (int in = 0; in < In::channels; in++)
                    for (int kh = 0; kh < K; kh++)
#pragma GCC unroll 3
                        for (int kw = 0; kw < K; kw++) {
                            const Vector* pixels = &x(in, h + kh - K / 2, w + kw - K / 2);
                            const int tap = kh * K + kw, rotated = K * K - 1 - tap;
#pragma GCC unroll 10
                            for (int c = 0; c < SIZE; c++) {
                                const int out = first + c;
                                const float factor = backward ? weight[(in * K * K + rotated) * Out::channels + out]
                                                              : weight[(out * K * K + tap) * In::channels + in];
                                left[c] += pixels[0] * factor;
                                right[c] += pixels[1] * factor;
                            }
                        }
                for (int c = 0; c < SIZE; c++) {
                    const float b = bias ? bias[first + c] : 0;
                    y(first + c, h, w) = left[c] + b;
                    if (w + 1 < Out::side) y(first + c, h, w + 1) = right[c] + b;
                }
            }
}

// The gradient of the weight, (out, K, K, in): sums of dz times x over pixels and images. Those for a row of the kernel
// and GROUP output channels stay in registers; ROWS rows are taken at a time, so that they stay in the cache.
template <int K, class In, class Out>
[[gnu::noinline]] static void weight_gradient(In& x, Out& dz, Vector* scratch, float* gradient, Part part) {
    constexpr int GROUP = LANES < 16 && Out::channels % 4 == 0 ? 4 : 5, ROWS = Out::side == 28 ? 2 : 7;
    for (int top = 0; top < Out::side; top += ROWS)
        for (int first = part.first(dz); first < part.end(dz); first += GROUP)
            for (int in = 0; in < In::channels; in++)
                for (int kh = 0; kh < K; kh++) {
                    Vector total[GROUP][K] = {};
                    for (int h = top; h < top + ROWS; h++)
                        for (int w = 0; w < Out::side; w++)
#pragma GCC unroll 5
                            for (int c = 0; c < GROUP; c++)
#pragma GCC unroll 3
                                for (int kw = 0; kw < K; kw++)
                                    total[c][kw] += x(in, h + kh - K / 2, w + kw - K / 2) * dz(first + c, h, w);
                    for (int c = 0; c < GROUP; c++)
                        for (int kw = 0; kw < K; kw++) {
                            Vector& place = scratch[(((first + c) * K + kh) * K + kw) * In::channels + in];
                            place = top ? place + total[c][kw] : total[c][kw];
                        }
                }
    constexpr int size = K * K * In::channels;
    for (int i = part.first(dz) * size; i < part.end(dz) * size; i++) gradient[i] = sum(scratch[i]);
}

// ---------------------------------------------------------------- batch normalisation, activation, max-pool, dropout

// Leaves each channel's mean, and the sum of its squared deviations from that mean, in z.
static void measure(auto& z, Part part) {
    for (int c = part.first(z); c < part.end(z); c++) {
        Vector squares = {};
        const float mean = z.mean[c] = channel_sum(z, c) / (z.area * LANES);
        for_pixels(z, [&](int h, int w) { squares += (z(c, h, w) - mean) * (z(c, h, w) - mean); });
        z.squares[c] = sum(squares);
    }
}

// Of each channel: y = norm(z) = (z - mean) * inverse * gamma + beta = z * scale + shift
template <int CHANNELS>
struct Norm {
    float mean[CHANNELS], inverse[CHANNELS], scale[CHANNELS], shift[CHANNELS];

    Norm(const float* means, const float* variances, const auto& layer) {
        for (int c = 0; c < CHANNELS; c++) {
            mean[c] = means[c];
            inverse[c] = 1 / std::sqrt(variances[c] + 1e-5f);  // nn.BatchNorm2d's eps
            scale[c] = layer.gamma[c] * inverse[c];
            shift[c] = layer.beta[c] - mean[c] * scale[c];
        }
    }
    Vector operator()(int c, Vector z) const { return z * scale[c] + shift[c]; }
};

// The activation, which __init__.py names to the compiler, and its slope, as PyTorch has it at the edges. NaN must stay
// NaN, or a diverged run would look like one that learns: so ReLU is not max(0, y).
#if defined HARDSWISH
static inline Vector activation(Vector y) { return y < -3.0f ? 0.0f : y > 3.0f ? y : y * (y + 3.0f) * (1 / 6.0f); }
static inline Vector slope(Vector y) { return y <= -3.0f ? 0.0f : y >= 3.0f ? 1.0f : y * (1 / 3.0f) + 0.5f; }
#elif defined RELU
static inline Vector activation(Vector y) { return y < 0.0f ? 0.0f : y; }
static inline Vector slope(Vector y) { return y > 0.0f ? 1.0f : 0.0f; }
#else
#error "no such activation in backend.cpp"
#endif

// a = activation(norm(z))
static void norm_activation(auto& z, const auto& norm, auto& a, Part part) {
    for (int c = part.first(z); c < part.end(z); c++)
        for_pixels(z, [&](int h, int w) { a(c, h, w) = activation(norm(c, z(c, h, w))); });
}

// A value is dropped where a hash of its index in the batch and of a key is below the threshold. Each batch and layer
// has a new random key. The hash, uniform in 32 bits, is lowbias32 of C. Wellons' hash-prospector.
struct Dropout {
    float rate;
    uint32_t key, batch, threshold = rate * 4294967296.0;
    float scale = 1 / (1 - rate);  // of what stays

    auto keeps(uint32_t index) const {
        Integers hash;
        for (int lane = 0; lane < LANES; lane++) hash[lane] = index + lane;
        hash = (hash * 0x9E3779B9u) ^ key;
        hash = (hash ^ (hash >> 16)) * 0x7FEB352Du;
        hash = (hash ^ (hash >> 15)) * 0x846CA68Bu;
        return (hash ^ (hash >> 16)) >= threshold;
    }
};

// a = dropout(activation(pool(norm(z)))). winner: which of a window's four values was the largest, 0 to 3 in reading
// order and the first of equals, as in PyTorch, or 4 where dropout drops it. image: the block's first in the batch.
static void norm_pool(auto& z, const auto& norm, auto& a, auto& winner, const Dropout& dropout, int image, Part part) {
    for (int c = part.first(a); c < part.end(a); c++)
        for_pixels(a, [&](int h, int w) {
            const Vector y0 = norm(c, z(c, 2 * h, 2 * w)), y1 = norm(c, z(c, 2 * h, 2 * w + 1));
            const Vector y2 = norm(c, z(c, 2 * h + 1, 2 * w)), y3 = norm(c, z(c, 2 * h + 1, 2 * w + 1));
            const Vector upper = y0 > y1 ? y0 : y1, lower = y2 > y3 ? y2 : y3, largest = upper > lower ? upper : lower;
            const Vector corner = y0 == largest ? 0.0f : y1 == largest ? 1.0f : y2 == largest ? 2.0f : 3.0f;
            const auto keeps = dropout.keeps(((c * a.side + h) * a.side + w) * dropout.batch + image);
            winner(c, h, w) = keeps ? corner : 4.0f;
            a(c, h, w) = keeps ? activation(largest) * dropout.scale : 0.0f;
        });
}

// The gradient of activation(y), given da, that of a = dropout(activation(pool(y))): the winner gets all of it.
static auto unpool(auto& da, auto& winner, const Dropout& dropout) {
    return [&](int c, int h, int w) {
        const float corner = 2 * (h % 2) + w % 2;
        return winner(c, h / 2, w / 2) == corner ? da(c, h / 2, w / 2) * dropout.scale : 0.0f;
    };
}

// A block's share of the gradients of gamma and beta, given da(c, h, w), the gradient of activation(norm(z)).
static void norm_gradient(auto& z, const auto& norm, auto&& da, auto& gradient, Part part) {
    for (int c = part.first(z); c < part.end(z); c++) {
        Vector product = {}, total = {};
        for_pixels(z, [&](int h, int w) {
            const Vector dy = da(c, h, w) * slope(norm(c, z(c, h, w)));
            product += dy * (z(c, h, w) - norm.mean[c]);
            total += dy;
        });
        gradient.gamma[c] = sum(product) * norm.inverse[c];
        gradient.beta[c] = sum(total);
    }
}

// ---------------------------------------------------------------- the network

template <int IN, int OUT>
struct Layer {  // a 3x3 convolution, its weight as (out, 3, 3, in), and the batch normalisation after it
    float weight[OUT * 9 * IN], bias[OUT], gamma[OUT], beta[OUT];
};

// net.parameters(), or their gradients. That of a layer's bias is 0: batch normalisation subtracts the bias again.
struct Parameters {
    Layer<1, 10> layer1;
    Layer<10, 20> layer2;
    float conv3[200], bias3[10];
    Layer<10, 20> layer4;
    Layer<20, 20> layer5;
    Layer<20, 40> layer6;
    float conv7[400], bias7[10];
};

struct Result {
    Parameters gradients;
    float loss, right;  // the mean loss, and the number of images that were read right
};
static_assert(sizeof(Result) == 15442 * sizeof(float));

struct Statistics {  // of a batch normalisation: running_mean, running_var, num_batches_tracked
    float *mean, *variance;
    int64_t* batches;
};

// All that one block of images needs. In the backward pass, each map is overwritten by its own gradient.
struct Block {
    Maps<1, 28> x;                   // the images
    Maps<10, 28> z1, a1;             // conv1(x); activation(norm1(z1))
    Maps<20, 28> z2;                 // conv2(a1)
    Maps<20, 14> a2, winner2;        // drop1(activation(pool1(norm2(z2)))); pool1's winners
    Maps<10, 14> a3;                 // conv3(a2)
    Maps<20, 14> z4, a4, z5;         // conv4(a3); activation(norm4(z4)); conv5(a4)
    Maps<20, 7> a5, winner5;         // drop2(activation(pool2(norm5(z5)))); pool2's winners
    Maps<40, 7> z6;                  // conv6(a5)
    Vector average[40], output[10];  // gap(activation(norm6(z6))); log_softmax(conv7(average))
    Vector scratch[40 * 9 * 20];     // weight_gradient()'s
    Result result;                   // this block's share
};

// pixels: (batch, 28, 28). Where fewer than LANES images are left, blank ones fill the block.
static void read(const float* pixels, int image, int batch, Block& b) {
    for_pixels(b.x, [&](int h, int w) {
        for (int lane = 0; lane < LANES; lane++)
            b.x(0, h, w)[lane] = image + lane < batch ? pixels[(image + lane) * 784 + h * 28 + w] : 0;
    });
}

// From z6 to the log-probabilities.
static void head_forward(Block& b, const Norm<40>& norm6, const Parameters& p) {
    const float area = b.z6.area;
    for (int c = 0; c < 40; c++) {
        Vector total = {};
        for_pixels(b.z6, [&](int h, int w) { total += activation(norm6(c, b.z6(c, h, w))); });
        b.average[c] = total / area;
    }
    for (int k = 0; k < 10; k++) {
        b.output[k] = Vector{} + p.bias7[k];
        for (int c = 0; c < 40; c++) b.output[k] += b.average[c] * p.conv7[k * 40 + c];
    }
    for (int lane = 0; lane < LANES; lane++) {
        float largest = b.output[0][lane], total = 0;
        for (int k = 1; k < 10; k++) largest = std::max(largest, b.output[k][lane]);
        for (int k = 0; k < 10; k++) total += std::exp(b.output[k][lane] - largest);
        for (int k = 0; k < 10; k++) b.output[k][lane] -= largest + std::log(total);
    }
}

// The loss, and back: the average is overwritten by the gradient of each value that was averaged. labels: the block's.
static void head_backward(Block& b, const Parameters& p, const int64_t* labels, int batch) {
    const float area = b.z6.area;
    b.result.loss = b.result.right = 0;
    for (int lane = 0; lane < LANES; lane++) {
        int read = 0;
        for (int k = 1; k < 10; k++)
            if (b.output[k][lane] > b.output[read][lane]) read = k;
        b.result.right += read == labels[lane];
        b.result.loss -= b.output[labels[lane]][lane] / batch;
        for (int k = 0; k < 10; k++)  // the gradient of log-softmax's input
            b.output[k][lane] = (std::exp(b.output[k][lane]) - (k == labels[lane])) / batch;
    }
    for (int k = 0; k < 10; k++) {
        b.result.gradients.bias7[k] = sum(b.output[k]);
        for (int c = 0; c < 40; c++) b.result.gradients.conv7[k * 40 + c] = sum(b.output[k] * b.average[c]);
    }
    for (int c = 0; c < 40; c++) {
        b.average[c] = Vector{};
        for (int k = 0; k < 10; k++) b.average[c] += b.output[k] * p.conv7[k * 40 + c] / area;
    }
}

// The norm of the whole batch, from the moments of its blocks (Chan, Golub and LeVeque 1979).
template <class Z>
static auto norm_of_batch(const Block* blocks, int count, Z Block::*z, const auto& layer, const Statistics* running) {
    const float in_block = Z::area * LANES, n = in_block * count;  // values of a channel in a block, and in the batch
    float mean[Z::channels] = {}, variance[Z::channels] = {};
    for (int c = 0; c < Z::channels; c++) {
        for (int i = 0; i < count; i++) mean[c] += (blocks[i].*z).mean[c] / count;
        for (int i = 0; i < count; i++) {
            const float distance = (blocks[i].*z).mean[c] - mean[c];
            variance[c] += ((blocks[i].*z).squares[c] + in_block * distance * distance) / n;
        }
        if (!running) continue;
        running->mean[c] += 0.1f * (mean[c] - running->mean[c]);  // nn.BatchNorm2d's momentum
        running->variance[c] += 0.1f * (variance[c] * n / (n - 1) - running->variance[c]);
    }
    if (running) ++*running->batches;
    return Norm<Z::channels>(mean, variance, layer);
}

// z is overwritten by its own gradient. Through mean and variance, each z affects all n values of y in its channel:
// dz = scale * (dy - dbeta / n - (z - mean) * inverse * dgamma / n)
static void norm_backward(auto& z, const auto& norm, auto&& da, const Block* blocks, int count, auto layer, Part part) {
    const float n = count * LANES * z.area;
    for (int c = part.first(z); c < part.end(z); c++) {
        float dgamma = 0, dbeta = 0;
        for (int i = 0; i < count; i++) {
            dgamma += (blocks[i].result.gradients.*layer).gamma[c];
            dbeta += (blocks[i].result.gradients.*layer).beta[c];
        }
        const float scale = norm.scale[c], mean = norm.mean[c];
        const float pull = -scale * norm.inverse[c] * dgamma / n, offset = -scale * dbeta / n;
        for_pixels(z, [&](int h, int w) {
            const Vector dy = da(c, h, w) * slope(norm(c, z(c, h, w)));
            z(c, h, w) = scale * dy + pull * (z(c, h, w) - mean) + offset;
        });
    }
}

// ---------------------------------------------------------------- what __init__.py calls

extern "C" int lanes() { return LANES; }
extern "C" int block_floats() { return sizeof(Block) / sizeof(float); }

// A batch's forward pass, loss and backward pass in training mode. pixels: (batch, 1, 28, 28), labels: (batch,), batch:
// a multiple of LANES. Writes a Result to `output` and updates the running statistics. Without labels: evaluation mode,
// any number of images; writes log-probabilities (batch, 10). blocks: memory for the batch, zeros at the first call.
extern "C" void run_batch(Block* blocks, const Parameters& p, const Statistics* norms, const float* pixels,
                          const int64_t* labels, int batch, float rate1, float rate2, uint32_t key1, uint32_t key2,
                          int threads, float* output) {
    const int count = (batch + LANES - 1) / LANES;
    const Dropout dropout1{rate1, key1, uint32_t(batch)}, dropout2{rate2, key2, uint32_t(batch)};
    const int team = TEAMS && threads >= 2 * count ? 2 : 1;  // threads that share a block
    threads = std::max(1, std::min(threads, team * count));  // one, for no images at all
    std::barrier barrier(threads);

    auto work = [&](int thread) {
        const Part part{thread % team, team, barrier};
        auto each = [&](auto task) {  // for each block of this thread
            for (int i = thread / team; i < count; i += threads / team) task(blocks[i], i * LANES);
        };
        // Computes each block's x and z = conv(x). Returns the norm of z over the batch, the same in all threads.
        auto forward = [&]<class Z>(auto x, Z Block::*z, const auto& layer, const Statistics& running, auto make_x) {
            each([&](Block& b, int image) {
                make_x(b, image);
                convolve<3, false>(b.*x, layer.weight, layer.bias, b.*z, part);
                if (labels) measure(b.*z, part);
            });
            if (!labels) return Norm<Z::channels>(running.mean, running.variance, layer);
            barrier.arrive_and_wait();
            return norm_of_batch(blocks, count, z, layer, thread == 0 ? &running : nullptr);
        };
        // Writes the gradients of the layer's parameters; z and x are overwritten by their own. da(b): the gradient of
        // activation(norm(z)), to be called with (c, h, w): maps, or a function.
        auto backward = [&]<class X>(X Block::*x, auto z, auto layer, const auto& norm, auto da) {
            each([&](Block& b, int) { norm_gradient(b.*z, norm, da(b), b.result.gradients.*layer, part); });
            barrier.arrive_and_wait();
            each([&](Block& b, int) {
                norm_backward(b.*z, norm, da(b), blocks, count, layer, part);
                weight_gradient<3>(b.*x, b.*z, b.scratch, (b.result.gradients.*layer).weight, part);
                if constexpr (X::channels > 1) convolve<3, true>(b.*z, (p.*layer).weight, nullptr, b.*x, part);
            });
        };

        const Norm norm1 = forward(&Block::x, &Block::z1, p.layer1, norms[0], [&](Block& b, int image) {
            if (part.number == 0) read(pixels, image, batch, b);
        });
        const Norm norm2 = forward(&Block::a1, &Block::z2, p.layer2, norms[1],
                                   [&](Block& b, int) { norm_activation(b.z1, norm1, b.a1, part); });
        const Norm norm4 = forward(&Block::a3, &Block::z4, p.layer4, norms[2], [&](Block& b, int image) {
            norm_pool(b.z2, norm2, b.a2, b.winner2, dropout1, image, part);
            convolve<1, false>(b.a2, p.conv3, p.bias3, b.a3, part);
        });
        const Norm norm5 = forward(&Block::a4, &Block::z5, p.layer5, norms[3],
                                   [&](Block& b, int) { norm_activation(b.z4, norm4, b.a4, part); });
        const Norm norm6 = forward(&Block::a5, &Block::z6, p.layer6, norms[4], [&](Block& b, int image) {
            norm_pool(b.z5, norm5, b.a5, b.winner5, dropout2, image, part);
        });
        each([&](Block& b, int image) {
            part.wait();
            if (part.number == 0) head_forward(b, norm6, p);
            if (part.number == 0 && labels) head_backward(b, p, labels + image, batch);
            part.wait();
        });
        if (!labels) return;

        backward(&Block::a5, &Block::z6, &Parameters::layer6, norm6,
                 [](Block& b) { return [&](int c, int, int) { return b.average[c]; }; });
        backward(&Block::a4, &Block::z5, &Parameters::layer5, norm5,
                 [&](Block& b) { return unpool(b.a5, b.winner5, dropout2); });
        backward(&Block::a3, &Block::z4, &Parameters::layer4, norm4, [](Block& b) -> auto& { return b.a4; });
        each([&](Block& b, int) {
            weight_gradient<1>(b.a2, b.a3, b.scratch, b.result.gradients.conv3, part);
            for (int c = part.first(b.a3); c < part.end(b.a3); c++) b.result.gradients.bias3[c] = channel_sum(b.a3, c);
            convolve<1, true>(b.a3, p.conv3, nullptr, b.a2, part);
        });
        backward(&Block::a1, &Block::z2, &Parameters::layer2, norm2,
                 [&](Block& b) { return unpool(b.a2, b.winner2, dropout1); });
        backward(&Block::x, &Block::z1, &Parameters::layer1, norm1, [](Block& b) -> auto& { return b.a1; });
    };
    std::vector<std::thread> others;  // starting them takes some 30 microseconds
    for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
    work(0);
    for (std::thread& other : others) other.join();
    if (!labels)
        for (int i = 0; i < batch; i++)
            for (int k = 0; k < 10; k++) output[i * 10 + k] = blocks[i / LANES].output[k][i % LANES];
    else
        for (size_t k = 0; k < sizeof(Result) / sizeof(float); k++) {
            output[k] = 0;
            for (int i = 0; i < count; i++) output[k] += reinterpret_cast<float*>(&blocks[i].result)[k];
        }
}
