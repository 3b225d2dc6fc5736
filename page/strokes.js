/*
 * From strokes to a field: 28x28 pixels as MNIST's own were made.
 */

/**
 * @typedef {Array<number>} Point  [x, y], in widths of the drawing area, from its upper left corner; y downwards
 * @typedef {Array<Point>} Stroke  the pen's way from where it touches to where it is lifted
 */

const SIDE = 28; // pixels of the field
const FIT = 20; // pixels into which a digit is fitted
const PEN = 2.4; // width of a stroke, in pixels of the field

/** The number nearest to `value` from `least` to `most`. */
function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

/** The smallest box around strokes: its sides, in the strokes' own unit. */
function boundingBox(strokes) {
  const box = { left: Infinity, top: Infinity, right: -Infinity, bottom: -Infinity };
  for (const [x, y] of strokes.flat()) {
    box.left = Math.min(box.left, x);
    box.top = Math.min(box.top, y);
    box.right = Math.max(box.right, x);
    box.bottom = Math.max(box.bottom, y);
  }
  return box;
}

/** Strokes with each point moved: from [x, y] to where move() says. */
function mapPoints(strokes, move) {
  return strokes.map((stroke) => stroke.map(move));
}

/** A stroke with points at most `step` apart: those of a fast hand are far from each other. */
function resample(stroke, step) {
  const points = [stroke[0]];
  for (let i = 1; i < stroke.length; i++) {
    const [[x1, y1], [x2, y2]] = [stroke[i - 1], stroke[i]];
    const pieces = Math.ceil(Math.hypot(x2 - x1, y2 - y1) / step);
    for (let k = 1; k <= pieces; k++) points.push([x1 + ((x2 - x1) * k) / pieces, y1 + ((y2 - y1) * k) / pieces]);
  }
  return points;
}

/** Distance from a point to the line from (x1, y1) to (x2, y2). */
function distanceToSegment(x, y, x1, y1, x2, y2) {
  const length = (x2 - x1) ** 2 + (y2 - y1) ** 2;
  const along = length ? ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / length : 0;
  const t = clamp(along, 0, 1);
  return Math.hypot(x - x1 - t * (x2 - x1), y - y1 - t * (y2 - y1));
}

/**
 * Strokes drawn with a round pen, antialiased: a pixel is covered by how far its centre lies inside the stroke.
 *
 * @param {Array<Stroke>} strokes  in pixels of the image
 * @param {number} side  of the image, in pixels
 * @returns {Float32Array} (side * side) in [0, 1]
 */
function rasterise(strokes, side) {
  const image = new Float32Array(side * side);
  const reach = PEN / 2 + 0.5;
  const pixel = (edge) => clamp(Math.floor(edge), 0, side);
  for (const stroke of strokes) {
    stroke.forEach(([x2, y2], i) => {
      const [x1, y1] = stroke[Math.max(i - 1, 0)];
      const [left, right] = [Math.min(x1, x2) - reach, Math.max(x1, x2) + reach + 1].map(pixel);
      const [top, bottom] = [Math.min(y1, y2) - reach, Math.max(y1, y2) + reach + 1].map(pixel);
      for (let row = top; row < bottom; row++) {
        for (let column = left; column < right; column++) {
          const distance = distanceToSegment(column + 0.5, row + 0.5, x1, y1, x2, y2);
          const place = row * side + column;
          image[place] = Math.max(image[place], clamp(reach - distance, 0, 1));
        }
      }
    });
  }
  return image;
}

/** An image's centre of mass, [x, y], where the middle of its first pixel is [0, 0]. */
function centreOfMass(image, side) {
  let [mass, x, y] = [0, 0, 0];
  image.forEach((value, place) => {
    mass += value;
    x += value * (place % side);
    y += value * Math.floor(place / side);
  });
  return [x / mass, y / mass];
}

/**
 * A digit's strokes as a field, made as LeCun, Cortes and Burges describe for MNIST, and as reader/'s as_mnist does it
 * for pictures: fitted into 20x20 pixels, then moved by whole pixels so that its centre of mass lies on pixel 14.
 *
 * @param {Array<Stroke>} strokes  that are more than a dot
 * @returns {Float32Array} (28 * 28) in [0, 1], ink towards 1
 */
function makeField(strokes) {
  const { left, top, right, bottom } = boundingBox(strokes);
  const scale = (FIT - PEN) / Math.max(right - left, bottom - top); // pixels of the field to the unit
  const fitted = mapPoints(strokes, ([x, y]) => [(x - left) * scale + PEN / 2, (y - top) * scale + PEN / 2]);
  const [width, height] = [right - left, bottom - top].map((side) => Math.ceil(side * scale + PEN));
  const [x, y] = centreOfMass(rasterise(fitted, FIT), FIT);
  const shiftX = clamp(Math.round(14 - x), 0, SIDE - width);
  const shiftY = clamp(Math.round(14 - y), 0, SIDE - height);
  return rasterise(mapPoints(fitted, ([x, y]) => [x + shiftX, y + shiftY]), SIDE);
}
