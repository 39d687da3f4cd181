// Package sdktest is a trust domain in memory, for tests of programs that use
// Merlon's SDK. No Merlon has to run: [New] makes an authority, [TD.Workload]
// gives identities by name, [TD.Allow] and [TD.Deny] are the policy, and
// [TD.Revoke], [TD.Expire], [TD.Rotate], [TD.Withdraw], [TD.RemoveRoot] and
// [TD.StopAgent]
// are what may happen to a workload in its life. [TD.Partner] makes a second trust
// domain that federates with the first.
//
// The identities come over a real Unix socket by the real protocols, so
// programs can also be tested from outside with the SPIFFE_ENDPOINT_SOCKET
// that [TD.Address] gives. [NewInMemory] has the same protocols without a socket,
// for tests in a testing/synctest bubble, in which an hour takes no time.
package sdktest
