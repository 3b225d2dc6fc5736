/*
 * From strokes to digits: which strokes belong to the same digit, and what the digits are.
 */

// Shares of the larger one's size:
const TOUCHING = 0.05; // strokes that are nearer than this are one digit
const NEAR = 0.25; // what is farther apart than this is two digits
const LINE_GAP = 0.15; // what is farther below than this is on another line
const PART = 0.65; // two digits beside each other are both higher than this share of their height together
const SPECK = 0.2; // what is smaller than this share of the largest digit is no digit
const DOT = 0.015; // a stroke smaller than this share of the drawing area's width is a tap, and not read
const JOIN = 0.7; // what it costs to join strokes that do not touch, in units of -log(probability)

/** @typedef {{strokes: Array<Stroke>, box: Object, size: number}} Ink  some strokes, and the box around them */

/** @returns {Ink} */
function ink(strokes) {
  const box = boundingBox(strokes);
  return { strokes, box, size: Math.max(box.right - box.left, box.bottom - box.top) };
}

/** @returns {Ink} */
function join(parts) {
  return ink(parts.flatMap(({ strokes }) => strokes));
}

/** Whether ink is nearer to other ink than this share of the larger one's size, and lies less than `down` below it. */
function areNearer(a, b, share, down = share) {
  const size = Math.max(a.size, b.size);
  const distance = share * size;
  if (Math.max(a.box.left - b.box.right, b.box.left - a.box.right) > distance) return false;
  if (Math.max(a.box.top - b.box.bottom, b.box.top - a.box.bottom) > down * size) return false;
  const points = a.strokes.flatMap((stroke) => resample(stroke, size / 40));
  return points.some(([x, y]) =>
    b.strokes.some((stroke) =>
      stroke.some((point, i) => distanceToSegment(x, y, ...stroke[Math.max(i - 1, 0)], ...point) <= distance)
    )
  );
}

/** The items in lists of those that are related, directly or through others. */
function connected(items, areRelated) {
  let lists = [];
  for (const item of items) {
    const [related, others] = [[], []];
    for (const list of lists) (list.some((other) => areRelated(item, other)) ? related : others).push(list);
    lists = [...others, [...related.flat(), item]];
  }
  return lists;
}

/** The height of the lower one as a share of the height of both together. */
function lowerShare(a, b) {
  const [first, second, both] = [a, b, join([a, b])].map(({ box }) => box.bottom - box.top);
  return Math.min(first, second) / both;
}

/** At most 1, and less for ink that is wider than 0.8 of its height: it may be two digits. */
function slimness({ box }) {
  return clamp(1.8 - (box.right - box.left) / (box.bottom - box.top), 0.2, 1);
}

/**
 * The cheapest way to group ink that is near each other into digits. A digit costs -log(probability * slimness), and
 * JOIN for each part after its first.
 *
 * @param {Array<Ink>} parts  touching strokes each
 * @param {function(Array<Stroke>): Object} classify
 * @returns {Array<Object>} digits
 */
function cheapestGrouping(parts, classify) {
  parts.sort((a, b) => a.box.left + a.box.right - b.box.left - b.box.right);
  const ways = [{ cost: 0, digits: [] }]; // the cheapest up to each part
  for (let end = 1; end <= parts.length; end++) {
    ways[end] = { cost: Infinity };
    for (let start = end - 1; start >= 0; start--) {
      const group = join(parts.slice(start, end));
      const before = ways[start].digits;
      if (before.length && lowerShare(before[before.length - 1], group) < PART) continue;
      const least = ways[start].cost + JOIN * (end - start - 1) - Math.log(slimness(group));
      if (least >= ways[end].cost) continue; // whatever its probability
      const digit = { ...group, ...classify(group.strokes) };
      const cost = least - Math.log(digit.probability);
      if (cost < ways[end].cost) ways[end] = { cost, digits: [...before, digit] };
    }
  }
  return ways[parts.length].digits;
}

/** Digits in the order in which they are read: line by line, each from left to right. */
function inLines(digits) {
  const lines = [];
  for (const digit of [...digits].sort((a, b) => a.box.top + a.box.bottom - b.box.top - b.box.bottom)) {
    const last = lines[lines.length - 1];
    const isNew = !last || (digit.box.top + digit.box.bottom) / 2 > Math.max(...last.map(({ box }) => box.bottom));
    if (isNew) lines.push([digit]);
    else last.push(digit);
  }
  return lines.map((line) => line.sort((a, b) => a.box.left - b.box.left));
}

/**
 * The digits that strokes make, line by line.
 *
 * @param {Array<Stroke>} strokes
 * @param {function(Array<Stroke>): Object} classify  gives a digit's `value` and `probability`, which are kept with it
 * @returns {Array<Array<Object>>} digits as classify makes them, each with its `strokes` and `box`
 */
function readStrokes(strokes, classify) {
  const written = strokes.map((stroke) => ink([stroke])).filter(({ size }) => size >= DOT);
  const parts = connected(written, (a, b) => areNearer(a, b, TOUCHING)).map(join);
  const groups = connected(parts, (a, b) => areNearer(a, b, NEAR, LINE_GAP));
  const digits = groups.flatMap((group) => cheapestGrouping(group, classify));
  const largest = Math.max(...digits.map(({ size }) => size));
  return inLines(digits.filter(({ size }) => size >= SPECK * largest));
}
