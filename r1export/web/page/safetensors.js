// A safetensors file: u64 length | JSON header of that length | bytes. https://github.com/huggingface/safetensors

const TYPES = { F32: Float32Array, I64: BigInt64Array, U8: Uint8Array };

/**
 * The tensors of a file by name, each {shape, data}; types that the page does not read are left out.
 * Throws Error for a header that does not fit the bytes.
 */
export function readTensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] = [] }] of Object.entries(header)) {
    const Type = TYPES[dtype];
    if (name === "__metadata__" || !Type) continue;
    const count = shape.reduce((product, side) => product * side, 1);
    if (to - from !== count * Type.BYTES_PER_ELEMENT || start + to > bytes.length) {
      throw new Error(`tensor ${name} does not lie where the file's header says`);
    }
    tensors[name] = { shape, data: new Type(bytes.slice(start + from, start + to).buffer) };
  }
  return tensors;
}
