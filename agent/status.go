// What the agent tells `merlon doctor`: how it is, and for how long what it holds
// lasts if the CA died now.

package agent

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
)

// maxWaiting is how many entries without an SVID are named.
const maxWaiting = 20

// status implements agentpb.DebugServer's Status.
func (a *Agent) status(context.Context) *agentpb.StatusResponse {
	state, outlook := a.cache.State(), a.cache.Outlook()
	m := &agentpb.StatusResponse{
		AgentId: a.client.ID().String(), Now: timestamppb.Now(), PublicSocket: a.cfg.PublicSocket,
		CaAddress: a.client.Address(), CaAddresses: a.cfg.CAAddress, HeardAt: stamp(state.Heard),
		EntryCount:    int32(state.Entries),
		X509SvidCount: int32(outlook.X509), FirstX509SvidNotAfter: stamp(outlook.First), MedianX509SvidNotAfter: stamp(outlook.Median),
		JwtSvidCount: int32(outlook.JWTs), FirstJwtSvidNotAfter: stamp(outlook.FirstJWT), LastJwtSvidNotAfter: stamp(outlook.LastJWT),
		EntriesWithoutSvid:      outlook.Waiting[:min(len(outlook.Waiting), maxWaiting)],
		EntriesWithoutSvidCount: int32(len(outlook.Waiting)),
		OwnSvidNotAfter:         stamp(a.client.NotAfter()),
		RevocationMaxAge:        durationpb.New(a.cfg.RevocationMaxAge), OnStale: a.cfg.OnStale,
		SealedUnder: a.dir.Key().Place(), KeyConfigured: a.dir.Key().Configured(), KeysCached: a.cfg.CacheKeys == keysSealed,
		DataDir: a.cfg.DataDir,
	}
	if err := a.client.Following(a.cache); err != nil {
		m.CaFault = err.Error()
	}
	if ahead, known := a.client.ClockAhead(); known {
		m.ClockAhead = durationpb.New(ahead)
	}
	if e := a.policy.Active(); e != nil {
		m.PolicyGeneration, m.PolicyNotAfter = e.Generation(), stamp(e.NotAfter())
	}
	saved, err := a.keeper.State()
	m.CacheSavedAt = stamp(saved)
	if err != nil {
		m.CacheFault = err.Error()
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(a.cfg.DataDir, &fs); err == nil {
		m.FreeBytes = fs.Bavail * uint64(fs.Bsize)
	}
	return m
}

// stamp is unset for the zero time.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
