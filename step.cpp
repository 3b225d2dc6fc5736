// One training step of script.py's network on a processor: forward pass, loss and backward pass, in float32.
//
// step.py compiles this file, checks a batch against autograd, and then calls step() where script.py would call the
// network and loss.backward(). Optimizer, schedule and checkpoint see an ordinary PyTorch network: step() is given its
// parameters and returns their gradients, in the order of net.parameters(), and moves its running statistics.
//
// Layout. Images are taken in blocks of LANES, as many as a vector register holds numbers, and the image is the
// innermost axis: a Vector is one pixel of LANES images. So all that costs time is plain loops over whole vectors,
// whatever a map's size. A block's maps lie as [channel][row][column] in a frame of zeros, which is the convolutions'
// padding: a convolution reads its inputs without asking whether it stands at the edge.
//
// Threads. A thread takes whole blocks through all layers. Blocks meet only where batch normalisation needs sums over
// the batch, five times on the way forward and five on the way back. Every sum is taken within a block and then over
// the blocks in their order, so that any number of threads gives the same bits.

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, TILE = 10;  // 32 registers of 16 numbers: the sums of 10 channels x 2 pixels, and inputs
#else
constexpr int LANES = 8, TILE = 5;  // as AVX2's 16 registers of 8 numbers want it: 5 channels x 2 pixels
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));  // of a comparison: in each lane all bits, or none
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

// y = conv(x), with a weight as (out, K, K, in). A tile, TILE channels of two neighbouring pixels, stays in registers
// while all inputs pass by; where a row ends with one pixel, the other is dropped.
// backward: x is the gradient of that convolution's output and y that of its input. This is a convolution, too: without
// a bias, with in and out exchanged in the weight, and with the kernel turned by half a turn.
// Compiled apart from its callers, whose many variables would push the sums out of the registers.
template <int K, bool backward, class In, class Out>
[[gnu::noinline]] static void convolve(In& x, const float* weight, const float* bias, Out& y) {
    for (int first = 0; first < Out::channels; first += TILE)
        for (int h = 0; h < Out::side; h++)
            for (int w = 0; w < Out::side; w += 2) {
                Vector left[TILE] = {}, right[TILE] = {};
                for (int in = 0; in < In::channels; in++)
                    for (int kh = 0; kh < K; kh++)
#pragma GCC unroll 3
                        for (int kw = 0; kw < K; kw++) {
                            const Vector* pixels = &x(in, h + kh - K / 2, w + kw - K / 2);
                            const int tap = kh * K + kw, turned = K * K - 1 - tap;
#pragma GCC unroll 10
                            for (int c = 0; c < TILE; c++) {
                                const int out = first + c;
                                const float factor = backward ? weight[(in * K * K + turned) * Out::channels + out]
                                                              : weight[(out * K * K + tap) * In::channels + in];
                                left[c] += pixels[0] * factor;
                                right[c] += pixels[1] * factor;
                            }
                        }
                for (int c = 0; c < TILE; c++) {
                    const float b = bias ? bias[first + c] : 0;
                    y(first + c, h, w) = left[c] + b;
                    if (w + 1 < Out::side) y(first + c, h, w + 1) = right[c] + b;
                }
            }
}

// The gradient of the weight, (out, K, K, in): sums of dz times x over pixels and images. The K taps of a kernel's row,
// for GROUP output channels, stay in registers; ROWS rows of the maps are taken at a time, so that dz stays in the
// nearest cache.
template <int K, class In, class Out>
[[gnu::noinline]] static void weight_gradient(In& x, Out& dz, Vector* scratch, float* gradient) {
    constexpr int GROUP = LANES < 16 && Out::channels % 4 == 0 ? 4 : 5, ROWS = Out::side == 28 ? 2 : 7;
    for (int top = 0; top < Out::side; top += ROWS)
        for (int first = 0; first < Out::channels; first += GROUP)
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
    for (int i = 0; i < Out::channels * K * K * In::channels; i++) gradient[i] = sum(scratch[i]);
}

// ---------------------------------------------------------------- batch normalisation, activation, max-pool, dropout

// Leaves each channel's mean, and the sum of its squared deviations from that mean, in z.
static void measure(auto& z) {
    for (int c = 0; c < z.channels; c++) {
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

// The activation, which step.py names to the compiler, and its slope, as PyTorch has it at the edges. What is not a
// number must stay so, or a diverged run would look like one that learns: so ReLU is not the larger of 0 and y. (The
// max-pool may lose one, but then batch normalisation has made it of the whole channel.)
#if defined HARDSWISH
static inline Vector activation(Vector y) { return y < -3.0f ? 0.0f : y > 3.0f ? y : y * (y + 3.0f) * (1 / 6.0f); }
static inline Vector slope(Vector y) { return y <= -3.0f ? 0.0f : y >= 3.0f ? 1.0f : y * (1 / 3.0f) + 0.5f; }
#elif defined RELU
static inline Vector activation(Vector y) { return y < 0.0f ? 0.0f : y; }
static inline Vector slope(Vector y) { return y > 0.0f ? 1.0f : 0.0f; }
#else
#error "no such activation in step.cpp"
#endif

// a = activation(norm(z))
static void norm_activation(auto& z, const auto& norm, auto& a) {
    for (int c = 0; c < z.channels; c++)
        for_pixels(z, [&](int h, int w) { a(c, h, w) = activation(norm(c, z(c, h, w))); });
}

// A value is dropped where a hash of its index in the batch and of a key, drawn anew for each step and layer, is below
// the threshold. The hash, uniform in 32 bits, is lowbias32 of C. Wellons' hash-prospector.
struct Dropout {
    float rate;
    uint32_t key, threshold = rate * 4294967296.0;
    float scale = 1 / (1 - rate);  // of what stays

    Mask keeps(uint32_t index) const {
        Integers hash;
        for (int lane = 0; lane < LANES; lane++) hash[lane] = index + lane;
        hash = (hash * 0x9E3779B9u) ^ key;
        hash = (hash ^ (hash >> 16)) * 0x7FEB352Du;
        hash = (hash ^ (hash >> 15)) * 0x846CA68Bu;
        return (hash ^ (hash >> 16)) >= threshold;
    }
};

// a = dropout(activation(pool(norm(z)))). winner: which of a window's four values was the largest, 0 to 3 in reading
// order and the first of equals, as in PyTorch, or 4, which is none of them, where dropout drops it. The block holds
// the batch's images from number `image` on.
static void norm_pool(auto& z, const auto& norm, auto& a, auto& winner, const Dropout& dropout, int image, int batch) {
    for (int c = 0; c < a.channels; c++)
        for_pixels(a, [&](int h, int w) {
            const Vector y0 = norm(c, z(c, 2 * h, 2 * w)), y1 = norm(c, z(c, 2 * h, 2 * w + 1));
            const Vector y2 = norm(c, z(c, 2 * h + 1, 2 * w)), y3 = norm(c, z(c, 2 * h + 1, 2 * w + 1));
            const Vector upper = y0 > y1 ? y0 : y1, lower = y2 > y3 ? y2 : y3, largest = upper > lower ? upper : lower;
            const Vector corner = y0 == largest ? 0.0f : y1 == largest ? 1.0f : y2 == largest ? 2.0f : 3.0f;
            const Mask keeps = dropout.keeps(((c * a.side + h) * a.side + w) * batch + image);
            winner(c, h, w) = keeps ? corner : 4.0f;
            a(c, h, w) = keeps ? activation(largest) * dropout.scale : 0.0f;
        });
}

// The gradient of y = norm(z), as a function of (c, h, w), given da(c, h, w), that of activation(y).
static auto unactivate(auto&& da, auto& z, const auto& norm) {
    return [&](int c, int h, int w) { return da(c, h, w) * slope(norm(c, z(c, h, w))); };
}

// The gradient of activation(y), as a function of (c, h, w), given da, that of a = dropout(activation(pool(y))): all of
// it is the winner's, which was chosen by y.
static auto unpool(auto& da, auto& winner, const Dropout& dropout) {
    return [&](int c, int h, int w) {
        const float corner = 2 * (h % 2) + w % 2;
        return winner(c, h / 2, w / 2) == corner ? da(c, h / 2, w / 2) * dropout.scale : 0.0f;
    };
}

// A block's share of the gradients of gamma and beta, given g(c, h, w), the gradient of y = norm(z).
static void norm_gradient(auto& z, const auto& norm, const auto& g, auto& gradient) {
    for (int c = 0; c < z.channels; c++) {
        Vector product = {}, total = {};
        for_pixels(z, [&](int h, int w) {
            product += g(c, h, w) * (z(c, h, w) - norm.mean[c]);
            total += g(c, h, w);
        });
        gradient.gamma[c] = sum(product) * norm.inverse[c];
        gradient.beta[c] = sum(total);
    }
}

// ---------------------------------------------------------------- the network

template <int IN, int OUT>
struct Layer {  // a 3x3 convolution, its weight as (out, 3, 3, in), and the batch normalisation behind it
    float weight[OUT * 9 * IN], bias[OUT], gamma[OUT], beta[OUT];
};

// All parameters, or the gradients of all. A layer's bias has none, and its place stays 0: batch normalisation takes a
// bias out again.
struct Network {
    Layer<1, 10> layer1;
    Layer<10, 20> layer2;
    float conv3[200], bias3[10];
    Layer<10, 20> layer4;
    Layer<20, 20> layer5;
    Layer<20, 40> layer6;
    float conv7[400], bias7[10];
};

struct Result : Network {  // the gradients
    float loss, right;  // the mean loss, and how many images were read right
};

static_assert(sizeof(Result) == (15440 + 2) * sizeof(float));

struct Statistics {  // of a batch normalisation: running_mean, running_var, num_batches_tracked
    float *mean, *variance;
    int64_t* batches;
};

// All that one block of images needs. On the way back each convolution's output z, and each of its inputs a, gives way
// to its own gradient.
struct Block {
    Maps<1, 28> x;
    Maps<10, 28> z1, a1;
    Maps<20, 28> z2;
    Maps<20, 14> a2, winner2;
    Maps<10, 14> a3;
    Maps<20, 14> z4, a4, z5;
    Maps<20, 7> a5, winner5;
    Maps<40, 7> z6;
    Vector average[40], output[10];  // of global average pooling and of the network
    Vector scratch[40 * 9 * 20];  // weight_gradient()'s
    Result result;  // this block's share
};

// pixels: (batch, 28, 28). Where fewer than LANES images are left, blank ones fill the block up.
static void read(const float* pixels, int image, int batch, Block& b) {
    for_pixels(b.x, [&](int h, int w) {
        for (int lane = 0; lane < LANES; lane++)
            b.x(0, h, w)[lane] = image + lane < batch ? pixels[(image + lane) * 784 + h * 28 + w] : 0;
    });
}

// From z6 to the log-probabilities, b.output: norm, activation, global average pooling, last convolution, log-softmax.
// With labels also the loss, and the way back to the average: output gives way to its gradient, and average to that of
// each value that was averaged.
static void head(Block& b, const Norm<40>& norm6, const Network& p, const int64_t* label, int batch) {
    for (int c = 0; c < 40; c++) {
        Vector total = {};
        for_pixels(b.z6, [&](int h, int w) { total += activation(norm6(c, b.z6(c, h, w))); });
        b.average[c] = total / 49.0f;
    }
    for (int k = 0; k < 10; k++) {
        b.output[k] = Vector{} + p.bias7[k];
        for (int c = 0; c < 40; c++) b.output[k] += b.average[c] * p.conv7[k * 40 + c];
    }
    b.result.loss = b.result.right = 0;
    for (int lane = 0; lane < LANES; lane++) {
        float y[10], total = 0;
        for (int k = 0; k < 10; k++) y[k] = b.output[k][lane];
        const float largest = *std::max_element(y, y + 10);
        for (int k = 0; k < 10; k++) total += std::exp(y[k] - largest);
        for (int k = 0; k < 10; k++) y[k] -= largest + std::log(total);
        for (int k = 0; k < 10; k++) b.output[k][lane] = label ? (std::exp(y[k]) - (k == label[lane])) / batch : y[k];
        if (!label) continue;
        b.result.right += std::max_element(y, y + 10) - y == label[lane];
        b.result.loss -= y[label[lane]] / batch;
    }
    if (!label) return;
    for (int k = 0; k < 10; k++) {
        b.result.bias7[k] = sum(b.output[k]);
        for (int c = 0; c < 40; c++) b.result.conv7[k * 40 + c] = sum(b.output[k] * b.average[c]);
    }
    for (int c = 0; c < 40; c++) {
        b.average[c] = Vector{};
        for (int k = 0; k < 10; k++) b.average[c] += b.output[k] * p.conv7[k * 40 + c] / 49.0f;
    }
}

// ---------------------------------------------------------------- the batch

// The norm of the whole batch, from the moments of its blocks (Chan, Golub and LeVeque 1979).
template <class Z>
static Norm<Z::channels> norm_of_batch(const Block* blocks, int count, Z Block::*z, const auto& layer,
                                       const Statistics* running) {
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

// The gradient of z takes z's place, pixel by pixel, for g reads z at its own place. Given are g(c, h, w), that of
// y = norm(z), and all blocks' shares of those of gamma and beta. By way of mean and variance, each z has a hand in all
// n values of y of its channel:
// dz = scale * (g - dbeta / n - (z - mean) * inverse * dgamma / n)
static void norm_backward(auto& z, const auto& norm, const auto& g, const Block* blocks, int count, auto layer) {
    const float n = count * LANES * z.area;
    for (int c = 0; c < z.channels; c++) {
        float dgamma = 0, dbeta = 0;
        for (int i = 0; i < count; i++) {
            dgamma += (blocks[i].result.*layer).gamma[c];
            dbeta += (blocks[i].result.*layer).beta[c];
        }
        const float scale = norm.scale[c], mean = norm.mean[c];
        const float pull = -scale * norm.inverse[c] * dgamma / n, offset = -scale * dbeta / n;
        for_pixels(z, [&](int h, int w) { z(c, h, w) = scale * g(c, h, w) + pull * (z(c, h, w) - mean) + offset; });
    }
}

// ---------------------------------------------------------------- what step.py calls

extern "C" {

int lanes() { return LANES; }
int block_floats() { return sizeof(Block) / sizeof(float); }

// Forward, loss and backward of a batch. pixels: (batch, 1, 28, 28), labels: (batch,), batch a multiple of LANES.
// Leaves a Result in `output`, and moves the running statistics. Without labels, it is the network in evaluation mode,
// for any number of images; output: (batch, 10) log-probabilities. blocks: memory for as many as hold the batch, of
// zeros at the first call, and so the frames stay.
void step(Block* blocks, const Network& p, const Statistics* norms, const float* pixels, const int64_t* labels,
          int batch, float rate1, float rate2, uint32_t key1, uint32_t key2, int threads, float* output) {
    const int count = (batch + LANES - 1) / LANES;
    const Dropout dropout1{rate1, key1}, dropout2{rate2, key2};
    threads = std::max(1, std::min(threads, count));  // one, for no images at all
    std::barrier barrier(threads);

    auto work = [&](int thread) {
        auto each = [&](auto part) {  // for each block of this thread
            for (int i = thread; i < count; i += threads) part(blocks[i], i * LANES);
        };
        // Makes each block's x, and z = conv(x); gives the norm of z over the batch, the same to all threads.
        auto forward = [&]<class Z>(auto x, Z Block::*z, const auto& layer, const Statistics& running, auto make_x) {
            each([&](Block& b, int image) {
                make_x(b, image);
                convolve<3, false>(b.*x, layer.weight, layer.bias, b.*z);
                if (labels) measure(b.*z);
            });
            if (!labels) return Norm<Z::channels>(running.mean, running.variance, layer);
            barrier.arrive_and_wait();
            return norm_of_batch(blocks, count, z, layer, thread == 0 ? &running : nullptr);
        };
        // Leaves the layer's gradients, and x gives way to its own. da(b): that of activation(norm(z)), as something
        // to be called with (c, h, w): maps, or a function.
        auto backward = [&]<class X>(X Block::*x, auto z, auto layer, const auto& norm, auto da) {
            each([&](Block& b, int) {
                norm_gradient(b.*z, norm, unactivate(da(b), b.*z, norm), b.result.*layer);
            });
            barrier.arrive_and_wait();
            each([&](Block& b, int) {
                norm_backward(b.*z, norm, unactivate(da(b), b.*z, norm), blocks, count, layer);
                weight_gradient<3>(b.*x, b.*z, b.scratch, (b.result.*layer).weight);
                if constexpr (X::channels > 1) convolve<3, true>(b.*z, (p.*layer).weight, nullptr, b.*x);
            });
        };

        const Norm norm1 = forward(&Block::x, &Block::z1, p.layer1, norms[0], [&](Block& b, int image) {
            read(pixels, image, batch, b);
        });
        const Norm norm2 = forward(&Block::a1, &Block::z2, p.layer2, norms[1], [&](Block& b, int) {
            norm_activation(b.z1, norm1, b.a1);
        });
        const Norm norm4 = forward(&Block::a3, &Block::z4, p.layer4, norms[2], [&](Block& b, int image) {
            norm_pool(b.z2, norm2, b.a2, b.winner2, dropout1, image, batch);
            convolve<1, false>(b.a2, p.conv3, p.bias3, b.a3);
        });
        const Norm norm5 = forward(&Block::a4, &Block::z5, p.layer5, norms[3], [&](Block& b, int) {
            norm_activation(b.z4, norm4, b.a4);
        });
        const Norm norm6 = forward(&Block::a5, &Block::z6, p.layer6, norms[4], [&](Block& b, int image) {
            norm_pool(b.z5, norm5, b.a5, b.winner5, dropout2, image, batch);
        });
        each([&](Block& b, int image) { head(b, norm6, p, labels ? labels + image : nullptr, batch); });
        if (!labels) return;

        backward(&Block::a5, &Block::z6, &Network::layer6, norm6,
                 [](Block& b) { return [&](int c, int, int) { return b.average[c]; }; });
        backward(&Block::a4, &Block::z5, &Network::layer5, norm5,
                 [&](Block& b) { return unpool(b.a5, b.winner5, dropout2); });
        backward(&Block::a3, &Block::z4, &Network::layer4, norm4, [](Block& b) -> auto& { return b.a4; });
        each([&](Block& b, int) {
            weight_gradient<1>(b.a2, b.a3, b.scratch, b.result.conv3);
            for (int c = 0; c < 10; c++) b.result.bias3[c] = channel_sum(b.a3, c);
            convolve<1, true>(b.a3, p.conv3, nullptr, b.a2);
        });
        backward(&Block::a1, &Block::z2, &Network::layer2, norm2,
                 [&](Block& b) { return unpool(b.a2, b.winner2, dropout1); });
        backward(&Block::x, &Block::z1, &Network::layer1, norm1, [](Block& b) -> auto& { return b.a1; });
    };
    std::vector<std::thread> others;  // starting them anew takes some 30 microseconds, and leaves nothing behind
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
}
