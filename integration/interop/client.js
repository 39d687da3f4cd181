// A workload in JavaScript, built on @grpc/grpc-js and the standard's proto
// alone. It prints one JSON object about what the Workload API gave it:
// `client.js PROTO refused` before it has an entry, `client.js PROTO served`
// with one, until its X509-SVID was replaced.
"use strict";

const crypto = require("node:crypto");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const protobuf = require("protobufjs");

const audience = "orders";
const [proto, act] = process.argv.slice(2);
const { SpiffeWorkloadAPI } = grpc.loadPackageDefinition(
  loader.loadSync(proto, { keepCase: true, includeDirs: [] }),
);
const api = new SpiffeWorkloadAPI(process.env.SPIFFE_ENDPOINT_SOCKET, grpc.credentials.createInsecure());

const header = new grpc.Metadata();
header.set("workload.spiffe.io", "true");
const deadline = () => ({ deadline: Date.now() + 60_000 }); // the test ends sooner

// What grpc-js leaves encoded in an error's metadata.
const details = protobuf.parse(`syntax = "proto3"; package google;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }`).root;

function describe(err) {
  const found = { code: grpc.status[err.code] };
  for (const raw of err.metadata?.get("grpc-status-details-bin") ?? []) {
    for (const any of details.lookupType("Status").decode(raw).details) {
      if (any.typeUrl.endsWith("/google.rpc.ErrorInfo")) {
        const { reason, domain } = details.lookupType("ErrorInfo").decode(any.value);
        Object.assign(found, { reason, domain });
      }
    }
  }
  return found;
}

const unary = (method, request) =>
  new Promise((resolve, reject) =>
    api[method](request, header, deadline(), (err, answer) => (err ? reject(err) : resolve(answer))));

// first is the first message of a stream.
async function first(method, metadata = header) {
  const stream = api[method]({}, metadata, deadline());
  try {
    for await (const message of stream) return message;
  } finally {
    stream.on("error", () => {}); // that it was cancelled
    stream.cancel();
  }
}

const failure = (call) => call.then(() => ({ code: "OK" }), describe);

// split takes certificates apart that lie one after the other in DER.
function split(der) {
  const certs = [];
  for (let at = 0; at < der.length; ) {
    let length = der[at + 1], head = 2;
    if (length & 0x80) {
      const bytes = length & 0x7f;
      length = der.readUIntBE(at + 2, bytes);
      head += bytes;
    }
    certs.push(new crypto.X509Certificate(der.subarray(at, at + head + length)));
    at += head + length;
  }
  return certs;
}

async function refused() {
  return {
    no_header: await failure(first("FetchX509SVID", new grpc.Metadata())),
    x509_svid: await failure(first("FetchX509SVID")),
    x509_bundles: await failure(first("FetchX509Bundles")),
    jwt_svid: await failure(unary("FetchJWTSVID", { audience: [audience] })),
    jwt_bundles: await failure(first("FetchJWTBundles")),
    validate: await failure(unary("ValidateJWTSVID", { audience, svid: "a.b.c" })),
  };
}

// identity reads one X509-SVID, and checks that key, chain and bundle belong
// together.
function identity({ svids: [svid] }) {
  const [leaf, intermediate] = split(svid.x509_svid);
  const key = crypto.createPrivateKey({ key: svid.x509_svid_key, format: "der", type: "pkcs8" });
  const root = split(svid.bundle).find((cert) => intermediate.checkIssued(cert));
  if (!leaf.checkPrivateKey(key) || !leaf.verify(intermediate.publicKey) || !intermediate.verify(root.publicKey)) {
    throw new Error("key, chain and bundle do not belong together");
  }
  return { id: svid.spiffe_id, san: leaf.subjectAltName, serial: leaf.serialNumber.toLowerCase() };
}

async function served() {
  const stream = api.FetchX509SVID({}, header, deadline());
  const seen = [];
  for await (const message of stream) {
    const now = identity(message);
    if (seen.length === 0 || seen[0].serial !== now.serial) seen.push(now);
    if (seen.length === 2) break;
  }
  stream.on("error", () => {}); // that it was cancelled
  stream.cancel();
  const { svids: [token] } = await unary("FetchJWTSVID", { audience: [audience] });
  const names = (bundles) => Object.keys(bundles).map((id) => id.replace("spiffe://", ""));
  return {
    spiffe_id: seen[0].san === `URI:${seen[0].id}` ? seen[0].id : seen[0].san,
    serials: seen.map(({ serial }) => serial),
    x509_bundles: names((await first("FetchX509Bundles")).bundles),
    jwt_bundles: names((await first("FetchJWTBundles")).bundles),
    jwt_svid: token.spiffe_id,
    validated: (await unary("ValidateJWTSVID", { audience, svid: token.svid })).spiffe_id,
    other_audience: await failure(unary("ValidateJWTSVID", { audience: "web", svid: token.svid })),
  };
}

({ refused, served })[act]()
  .then((found) => console.log(JSON.stringify(found)))
  .catch((err) => { console.error(err); process.exitCode = 1; })
  .finally(() => api.close());
