/*
 * What is shown: the drawing, the digits that are read, how sure the network is, and why.
 */

const LINE = 0.028; // width of a line in the drawing area, in its widths
const LAYERS = ["conv1", "conv2 + pool", "conv5 + pool", "conv6"]; // of the maps that forward() returns

const element = (id) => document.getElementById(id);

/** The colours of style.css, as [red, green, blue]. To ask for them at every update would take a third of its time. */
const COLOURS = {};
function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "paper", "line", "warm", "cold"]) {
    const hex = style.getPropertyValue(`--${name}`).trim();
    COLOURS[name] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  }
}

/** Fills a canvas, which gets this size: opacity(place) of each pixel in [0, 1], in one colour of COLOURS. */
function paint(canvas, width, height, name, opacity) {
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  const [red, green, blue] = COLOURS[name];
  for (let place = 0, i = 0; place < width * height; place++) {
    image.data[i++] = red;
    image.data[i++] = green;
    image.data[i++] = blue;
    image.data[i++] = 255 * opacity(place);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A field (28 * 28) as the network sees it. */
function paintField(canvas, field) {
  paint(canvas, SIDE, SIDE, "ink", (place) => field[place]);
}

/** The evidence for one digit (7 * 7) over its field: warm for it, cold against it, by the largest of its values. */
function paintEvidence(canvas, field, evidence) {
  const side = Math.sqrt(evidence.length);
  const most = Math.max(...evidence.map(Math.abs));
  const layer = document.createElement("canvas");
  const size = 8 * SIDE;
  Object.assign(canvas, { width: size, height: size });
  const context = canvas.getContext("2d");
  paintField(layer, field);
  context.imageSmoothingEnabled = false;
  context.globalAlpha = 0.45;
  context.drawImage(layer, 0, 0, size, size);
  context.imageSmoothingEnabled = true;
  context.globalAlpha = 0.85;
  for (const [name, sign] of [["warm", 1], ["cold", -1]]) {
    paint(layer, side, side, name, (place) => Math.max((sign * evidence[place]) / most, 0));
    context.drawImage(layer, 0, 0, size, size);
  }
}

/** All maps of a layer beside each other, a pixel apart: from white at 0 and below to the largest of their values. */
function paintMaps(canvas, { channels, side, data }) {
  const across = side > 7 ? 10 : 20;
  const [width, height] = [across, Math.ceil(channels / across)].map((count) => count * (side + 1) - 1);
  const most = data.reduce((max, value) => Math.max(max, value), 1e-9);
  paint(canvas, width, height, "ink", (place) => {
    const [x, y] = [place % width, Math.floor(place / width)];
    const [column, row] = [x % (side + 1), y % (side + 1)];
    const channel = Math.floor(y / (side + 1)) * across + Math.floor(x / (side + 1));
    const isGap = column === side || row === side || channel >= channels;
    return isGap ? 0 : Math.max(data[(channel * side + row) * side + column] / most, 0);
  });
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "destination-over"; // paper behind each map
  context.fillStyle = `rgb(${COLOURS.paper})`;
  for (let channel = 0; channel < channels; channel++) {
    context.fillRect((channel % across) * (side + 1), Math.floor(channel / across) * (side + 1), side, side);
  }
}

/** The drawing: strokes, or the field of a misread digit; where there are several digits, a line under each. */
function paintPad(canvas, strokes, digits, looked, field) {
  const width = Math.round(canvas.clientWidth * devicePixelRatio);
  const height = Math.round(canvas.clientHeight * devicePixelRatio);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  if (field) {
    const layer = document.createElement("canvas");
    paintField(layer, field);
    context.imageSmoothingEnabled = false;
    context.drawImage(layer, (width - height) / 2, 0, height, height);
    return;
  }
  const draw = (points, lineWidth, name) => {
    Object.assign(context, { lineWidth: lineWidth * width, lineCap: "round", lineJoin: "round" });
    context.strokeStyle = `rgb(${COLOURS[name]})`;
    context.beginPath();
    context.moveTo(points[0][0] * width - 0.01, points[0][1] * width); // or a tap, which has no length, is not drawn
    for (const [x, y] of points) context.lineTo(x * width, y * width);
    context.stroke();
  };
  for (const stroke of strokes) draw(stroke, LINE, "ink");
  if (digits.length < 2) return;
  for (const digit of digits) {
    const { left, right, bottom } = digit.box;
    const y = Math.min(bottom + 1.2 * LINE, height / width - 0.01);
    draw([[left, y], [right, y]], 0.005, digit === looked ? "warm" : "line");
  }
}

/** What the empty drawing area says, or the label of the misread digit in it (null: none). */
function showHint(hint, label, isEmpty) {
  const isMisread = label !== null;
  if (isMisread) hint.textContent = `Labelled ${label}. Write over it to begin anew.`;
  else hint.textContent = isEmpty ? "Write a digit here, or several beside each other." : "";
  hint.classList.toggle("label", isMisread);
}

/** A canvas for each layer's maps, with what they are. */
function makeMaps(parent, maps) {
  maps.forEach(({ channels, side }, i) => {
    const caption = make("figcaption", "", `${LAYERS[i]}: ${channels} x ${side} x ${side}`);
    parent.append(make("figure", "", caption, document.createElement("canvas")));
  });
}

/** A digit's field, the evidence in it for `asked`, and its maps; for no digit, empty ones. */
function showInside(digit, asked, maps) {
  element("question").textContent = digit ? `Evidence for ${asked}` : "Evidence";
  if (digit) {
    paintField(element("field"), digit.field);
    paintEvidence(element("evidence"), digit.field, digit.evidence.data.subarray(49 * asked, 49 * (asked + 1)));
  } else {
    for (const id of ["field", "evidence"]) element(id).width = SIDE; // which clears it
  }
  element("maps").querySelectorAll("canvas").forEach((canvas, i) => paintMaps(canvas, maps[i]));
}
