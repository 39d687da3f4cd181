// Package sdk gives a process its identity, and refuses strangers in its name.
//
// Start with [Open]: it asks the agent of the node for the process's X509-SVID
// and trust bundles and keeps them current. Then
//
//   - an HTTP service wraps its handler with httpauth.Handler and takes
//     [Identity.ServerTLS]; a client takes httpauth.Transport;
//   - a gRPC service takes grpcauth.ServerOptions, a client
//     grpcauth.DialOptions;
//   - anything else over TCP takes [Identity.Listener] and [Identity.DialTLS].
//
// Clients say whom they expect by a [Target]: [Service] or [ID]. Handlers find
// their caller by [PeerFromContext]. A caller whose call is denied gets a
// [DeniedError] that says why.
//
// Each call is decided by the policy; TLS alone lets a caller do nothing. The agent
// sends what the policy says of calls to this process, compiled, and it is decided
// here; where the policy has no compiled form the agent is asked. Whoever is revoked
// loses its open connections at once, and so does whoever's X509-SVID expires. While
// the agent is away the last X509-SVID and the last policy stay in use until they
// end, and calls that the agent must decide are denied with AGENT_UNAVAILABLE.
//
// Package sdktest has all of it in memory, for tests.
package sdk
