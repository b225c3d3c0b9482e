// A rank process that has no RDMA but plays it: its "address" is its device, and it connects where a cable lies between the two devices.
// CABLES: "a:b c:d …".

export {};

const cables = new Set((process.env.CABLES ?? "").split(" "));
const say = (message: object) => process.stdout.write(`${JSON.stringify(message)}\n`);
const text = (base64: string) => Buffer.from(base64, "base64").toString();
let device = "";
let rest = "";
for await (const chunk of Bun.stdin.stream()) {
  rest += new TextDecoder().decode(chunk);
  for (let end = rest.indexOf("\n"); end >= 0; end = rest.indexOf("\n")) {
    const message = JSON.parse(rest.slice(0, end));
    rest = rest.slice(end + 1);
    if (message.type === undefined) {
      device = message.rdmaDevice;
      say({ type: "address", address: Buffer.from(device).toString("base64") });
    } else if (message.type === "connect") {
      const [first, second] = (message.addresses as string[]).map(text);
      if (!cables.has(`${first}:${second}`) && !cables.has(`${second}:${first}`)) {
        say({
          type: "fatal",
          error: { code: "cluster_degraded", message: `nothing arrives over ${device}` },
        });
        process.exit(1);
      }
      say({ type: "connected", transport: "rdma", note: "", round_trip_us: 9 });
    } else if (message.type === "measure") say({ type: "measured", round_trip_us: 9.5, bandwidth: 5e9 });
  }
}
