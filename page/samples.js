/*
 * A sample of each digit, which the keys 0 to 9 write.
 */

/** Points of each stroke in a box of 60 by 100, through which a smooth line is drawn; a doubled point is a corner. */
const SAMPLES = [
  [[[34, 1], [14, 12], [3, 45], [9, 84], [29, 99], [49, 88], [58, 52], [51, 14], [34, 1]]],
  [[[20, 18], [36, 1], [36, 1], [35, 50], [33, 99]]],
  [[[4, 22], [14, 5], [34, 1], [51, 12], [52, 31], [36, 57], [3, 97], [3, 97], [58, 95]]],
  [[[6, 10], [28, 1], [48, 12], [45, 35], [22, 46], [22, 46], [47, 54], [55, 76], [37, 97], [14, 97], [2, 86]]],
  [[[32, 1], [20, 32], [3, 63], [3, 63], [58, 62]], [[45, 36], [43, 99]]],
  [[[13, 4], [8, 44], [8, 44], [32, 38], [52, 50], [55, 73], [41, 94], [18, 99], [2, 90]], [[13, 4], [54, 3]]],
  [[[46, 1], [22, 24], [6, 58], [9, 86], [29, 99], [50, 88], [52, 66], [35, 53], [16, 60], [8, 76]]],
  [[[3, 4], [57, 3], [57, 3], [38, 46], [24, 99]]],
  [[[50, 16], [38, 3], [24, 2], [12, 14], [16, 32], [36, 50], [52, 72], [46, 92], [28, 99], [10, 92], [6, 74], [22, 52],
    [44, 34], [50, 16]]],
  [[[52, 20], [34, 2], [12, 11], [6, 34], [22, 50], [42, 42], [52, 20], [52, 20], [50, 58], [44, 99]]],
];

/** A smooth line through points, a Catmull-Rom spline: eight points from each to the next. A ring has no ends. */
function smooth(points) {
  const last = points.length - 1;
  const isRing = String(points[0]) === String(points[last]);
  const at = (k) => points[isRing ? (k + last) % last : clamp(k, 0, last)];
  const line = [points[0]];
  for (let i = 1; i <= last; i++) {
    if (String(points[i]) === String(points[i - 1])) continue;
    const [a, b, c, d] = [i - 2, i - 1, i, i + 1].map(at);
    for (let step = 1; step <= 8; step++) {
      const t = step / 8;
      line.push(
        [0, 1].map((axis) => {
          const [slope1, slope2] = [(c[axis] - a[axis]) / 2, (d[axis] - b[axis]) / 2];
          const [h1, h2] = [t * t * (3 - 2 * t), t * (1 - t)];
          return (1 - h1) * b[axis] + h1 * c[axis] + h2 * ((1 - t) * slope1 - t * slope2);
        })
      );
    }
  }
  return line;
}

/**
 * Strokes with a sample digit to their right, all in the middle of the drawing area and small enough for it.
 *
 * @param {Array<Stroke>} strokes
 * @param {number} digit
 * @param {number} height  of the drawing area, in its widths
 * @returns {Array<Stroke>}
 */
function withSample(strokes, digit, height) {
  const beside = strokes.length ? boundingBox(strokes) : { right: 0, top: 0.2 * height, bottom: 0.8 * height };
  const unit = Math.max(beside.bottom - beside.top, 0.2 * height) / 100;
  const start = beside.right + 30 * unit;
  const sample = mapPoints(SAMPLES[digit].map(smooth), ([x, y]) => [start + x * unit, beside.top + y * unit]);
  const all = [...strokes, ...sample];
  const { left, right, top, bottom } = boundingBox(all);
  const scale = Math.min(1, 0.9 / (right - left), (0.9 * height) / (bottom - top));
  return mapPoints(all, ([x, y]) => [
    0.5 + (x - (left + right) / 2) * scale,
    height / 2 + (y - (top + bottom) / 2) * scale,
  ]);
}
