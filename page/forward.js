/*
 * The network's forward pass, line by line as in script.py's Net.forward. Batch normalisation is already part of the
 * convolutions' weights (page/__init__.py folds it in), and dropout does nothing outside training.
 */

/**
 * @typedef {Object} Maps  Feature maps, or an image: shape (channels, side, side).
 * @property {number} channels
 * @property {number} side  height and width in pixels
 * @property {Float32Array} data  channels * side * side values, row by row
 *
 * @typedef {Object} Layer  A convolution that keeps the side: kernel 1, or kernel 3 with padding 1.
 * @property {number} inputs  channels that it takes
 * @property {number} outputs  channels that it makes
 * @property {Float32Array} weight  shape (outputs, inputs, kernel, kernel), flat
 * @property {Float32Array} bias  shape (outputs)
 */

/** Bytes from their base64 text. */
function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** The network from the page's data: its activation, mean and std, and each layer by its name. */
function unpack({ activation, mean, std, layers, weights }) {
  const net = { activation, mean, std };
  const values = new Float32Array(bytes(weights).buffer);
  let start = 0;
  for (const { name, outputs, inputs, kernel } of layers) {
    const end = start + outputs * inputs * kernel * kernel;
    net[name] = { inputs, outputs, weight: values.subarray(start, end), bias: values.subarray(end, end + outputs) };
    start = end + outputs;
  }
  return net;
}

/** @type {Object<string, function(number): number>} */
const ACTIVATIONS = {
  hardswish: (x) => (x * Math.min(Math.max(x + 3, 0), 6)) / 6,
  relu: (x) => Math.max(x, 0),
};

/** The maps with a border of `width` zeros, (channels, side + 2 width, side + 2 width). */
function zeroPad(x, width) {
  const side = x.side + 2 * width;
  const padded = { channels: x.channels, side, data: new Float32Array(x.channels * side * side) };
  for (let row = 0; row < x.channels * x.side; row++) {
    const channel = Math.floor(row / x.side);
    const start = (channel * side + (row % x.side) + width) * side + width;
    padded.data.set(x.data.subarray(row * x.side, (row + 1) * x.side), start);
  }
  return padded;
}

/**
 * A 3x3 convolution: maps (inputs, side, side) -> (outputs, side, side). All nine weights of a filter at once:
 * one after the other they take twice as long.
 */
function conv3x3(x, { inputs, outputs, weight, bias }) {
  const side = x.side;
  const { data, side: wide } = zeroPad(x, 1);
  const y = { channels: outputs, side, data: new Float32Array(outputs * side * side) };
  for (let output = 0; output < outputs; output++) {
    const sum = y.data.subarray(output * side * side, (output + 1) * side * side).fill(bias[output]);
    for (let input = 0; input < inputs; input++) {
      const filter = (output * inputs + input) * 9;
      const [a, b, c, d, e, f, g, h, i] = weight.subarray(filter, filter + 9);
      for (let row = 0; row < side; row++) {
        let above = (input * wide + row) * wide;
        let here = above + wide;
        let below = here + wide;
        for (let to = row * side; to < (row + 1) * side; to++, above++, here++, below++) {
          sum[to] +=
            a * data[above] + b * data[above + 1] + c * data[above + 2] +
            d * data[here] + e * data[here + 1] + f * data[here + 2] +
            g * data[below] + h * data[below + 1] + i * data[below + 2];
        }
      }
    }
  }
  return y;
}

/** A 1x1 convolution: maps (inputs, side, side) -> (outputs, side, side). */
function conv1x1({ side, data }, { inputs, outputs, weight, bias }) {
  const area = side * side;
  const y = { channels: outputs, side, data: new Float32Array(outputs * area) };
  for (let output = 0; output < outputs; output++) {
    const sum = y.data.subarray(output * area, (output + 1) * area).fill(bias[output]);
    for (let input = 0; input < inputs; input++) {
      const w = weight[output * inputs + input];
      for (let place = 0; place < area; place++) sum[place] += w * data[input * area + place];
    }
  }
  return y;
}

/** The largest of each 2x2 square: (channels, side, side) -> (channels, side / 2, side / 2). */
function maxPool({ channels, side, data }) {
  const half = side / 2;
  const y = { channels, side: half, data: new Float32Array(channels * half * half) };
  for (let i = 0; i < y.data.length; i++) {
    const corner = 2 * Math.floor(i / half) * side + 2 * (i % half);
    y.data[i] = Math.max(data[corner], data[corner + 1], data[corner + side], data[corner + side + 1]);
  }
  return y;
}

/** The mean of each map: (channels, side, side) -> an array of `channels` numbers. */
function mean({ channels, side, data }) {
  const area = side * side;
  const means = new Float32Array(channels);
  for (let i = 0; i < data.length; i++) means[Math.floor(i / area)] += data[i] / area;
  return means;
}

/** The logarithms of the probabilities, from the last layer's output (10). */
function logSoftmax(logits) {
  const most = Math.max(...logits);
  const total = logits.reduce((sum, logit) => sum + Math.exp(logit - most), 0);
  return logits.map((logit) => logit - most - Math.log(total));
}

/**
 * A field through the network.
 *
 * script.py takes the mean before conv7. Both are linear, so conv7 may as well come first; then its output shows what
 * each of the 7x7 places contributes to each digit.
 *
 * @param {Object} net  `activation`, `mean` and `std` as in script.py, and the layers by name
 * @param {Float32Array} field  (28 * 28) in [0, 1], ink towards 1
 * @returns  logProbabilities (10), the maps of conv1 and of the three blocks, and the evidence (10, 7, 7)
 */
function forward(net, field) {
  const activation = ({ channels, side, data }) => ({ channels, side, data: data.map(ACTIVATIONS[net.activation]) });

  let x = { channels: 1, side: 28, data: field.map((value) => (value - net.mean) / net.std) };
  const conv1 = (x = activation(conv3x3(x, net.conv1))); // (10, 28, 28)
  const block1 = (x = activation(maxPool(conv3x3(x, net.conv2)))); // (20, 14, 14)
  x = conv1x1(x, net.conv3); // (10, 14, 14)
  x = activation(conv3x3(x, net.conv4)); // (20, 14, 14)
  const block2 = (x = activation(maxPool(conv3x3(x, net.conv5)))); // (20, 7, 7)
  const block3 = (x = activation(conv3x3(x, net.conv6))); // (40, 7, 7)
  const evidence = conv1x1(x, net.conv7); // (10, 7, 7)
  return { logProbabilities: logSoftmax(mean(evidence)), maps: [conv1, block1, block2, block3], evidence };
}
