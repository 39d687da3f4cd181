// What an agent's account means for a node.

package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
)

func TestDoctorNamesWhatIsWrong(t *testing.T) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	in := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	well := &agentpb.StatusResponse{
		AgentId: "spiffe://a.test/agent/n1", Now: in(0), PublicSocket: "/run/x", CaAddress: "ca:8443",
		HeardAt: in(-time.Minute), ClockAhead: durationpb.New(-time.Second), EntryCount: 3,
		OwnSvidNotAfter: in(40 * time.Minute), X509SvidCount: 2, FirstX509SvidNotAfter: in(30 * time.Minute), MedianX509SvidNotAfter: in(50 * time.Minute),
		JwtSvidCount: 1, FirstJwtSvidNotAfter: in(time.Minute), LastJwtSvidNotAfter: in(4 * time.Minute),
		PolicyGeneration: 7, PolicyNotAfter: in(24 * time.Hour), RevocationMaxAge: durationpb.New(5 * time.Minute), OnStale: "keep",
		CacheSavedAt: in(-time.Second), SealedUnder: "/k", KeysCached: true, DataDir: "/d", FreeBytes: 1 << 40,
	}
	for name, tt := range map[string]struct {
		change   func(*agentpb.StatusResponse)
		socket   error
		expiring time.Duration
		fails    string // names of the checks
	}{
		"well":                       {expiring: 29 * time.Minute},
		"socket":                     {socket: errors.New("connection refused"), fails: "socket"},
		"CA away":                    {change: func(s *agentpb.StatusResponse) { s.CaAddress, s.CaFault = "", "no changes arrive" }, fails: "ca"},
		"clock ahead":                {change: func(s *agentpb.StatusResponse) { s.ClockAhead = durationpb.New(31 * time.Second) }, fails: "clock"},
		"clock behind":               {change: func(s *agentpb.StatusResponse) { s.ClockAhead = durationpb.New(-31 * time.Second) }, fails: "clock"},
		"clock not known":            {change: func(s *agentpb.StatusResponse) { s.ClockAhead = nil }},
		"not attested":               {change: func(s *agentpb.StatusResponse) { s.OwnSvidNotAfter = nil }, fails: "agent_svid"},
		"own SVID ended":             {change: func(s *agentpb.StatusResponse) { s.OwnSvidNotAfter = in(0) }, fails: "agent_svid"},
		"own SVID ends":              {change: func(s *agentpb.StatusResponse) { s.OwnSvidNotAfter = in(10 * time.Minute) }, expiring: 10 * time.Minute, fails: "agent_svid"},
		"SVID ends":                  {expiring: 30 * time.Minute, fails: "expiring"},
		"policy ends":                {change: func(s *agentpb.StatusResponse) { s.PolicyNotAfter = in(time.Minute) }, expiring: time.Minute, fails: "expiring"},
		"nobody asked for an end":    {change: func(s *agentpb.StatusResponse) { s.PolicyNotAfter = in(time.Second) }},
		"entry waits":                {change: func(s *agentpb.StatusResponse) { s.EntriesWithoutSvidCount, s.EntriesWithoutSvid = 1, []string{"e1"} }, fails: "entries"},
		"cache not written":          {change: func(s *agentpb.StatusResponse) { s.CacheFault = "no space left on device" }, fails: "cache"},
		"cache not written yet":      {change: func(s *agentpb.StatusResponse) { s.CacheSavedAt = nil }, fails: "cache"},
		"disk full":                  {change: func(s *agentpb.StatusResponse) { s.FreeBytes = 1 << 20 }, fails: "disk"},
		"keys are kept off the disk": {change: func(s *agentpb.StatusResponse) { s.KeysCached = false }},
	} {
		t.Run(name, func(t *testing.T) {
			s := proto.Clone(well).(*agentpb.StatusResponse)
			if tt.change != nil {
				tt.change(s)
			}
			out := examine(s, tt.socket, tt.expiring)
			var fails []string
			for _, c := range out.Checks {
				if !c.OK {
					fails = append(fails, c.Name)
					if c.Message == "" || c.Hint == "" {
						t.Errorf("check %s says %q, and to do %q", c.Name, c.Message, c.Hint)
					}
				}
			}
			if strings.Join(fails, " ") != tt.fails || out.Healthy != (tt.fails == "") {
				t.Errorf("failing: %q, healthy %v; want %q", fails, out.Healthy, tt.fails)
			}
			var text strings.Builder
			if err := printDoctor(&text, &options{output: "table"}, out); err != nil {
				t.Fatal(err)
			}
			if strings.Count(text.String(), "FAIL") != len(fails) || !strings.Contains(text.String(), "in 30m0s (2026-11-26T12:30:00Z), of 2") {
				t.Errorf("printed:\n%s", text.String())
			}
		})
	}
	b := examine(well, nil, 0).Budget
	if !b.RevocationsEnd.Equal(now.Add(4*time.Minute)) || !b.SurvivesRestart || b.Policy != 7 || !b.MedianX509SVID.Equal(now.Add(50*time.Minute)) {
		t.Errorf("budget = %+v", b)
	}
}
