// A picture file as the bytes that preprocess.onnx takes.

/**
 * {data: Uint8Array (height, width, 3), height, width} of an image file, as r1export decodes it for training: the orientation
 * of EXIF is applied, transparency is composited on `fill` (red, green, blue), colour profiles and gamma are left alone.
 * Throws Error if this browser cannot decode it.
 */
export async function decode(file, fill) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name || "this"} is not an image that this browser can decode`);
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: composite(context.getImageData(0, 0, width, height).data, fill), height, width };
}

function composite(rgba, fill) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel++, to++) {
      rgb[to] = Math.round((rgba[from + channel] * alpha + fill[channel] * (255 - alpha)) / 255);
    }
  }
  return rgb;
}
