// merlon doctor: whether a node is well, and how long it goes on if the CA died
// now.

package main

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"merlon.dev/agent/agentpb"
	"merlon.dev/sdk/unixsock"
)

const (
	// maxClockAhead is what a clock may be off: SVIDs are backdated by twice that.
	maxClockAhead = 30 * time.Second
	// minFreeBytes is room for what an agent keeps of a large node.
	minFreeBytes = 64 << 20
)

// doctorJSON is `merlon doctor -o json`.
type doctorJSON struct {
	AgentID string      `json:"agent_id"`
	Healthy bool        `json:"healthy"`
	Budget  budgetJSON  `json:"outage_budget"`
	Checks  []checkJSON `json:"checks"`
}

// budgetJSON is what ends when, if the CA died now.
type budgetJSON struct {
	Now             time.Time  `json:"now"`
	X509SVIDs       int32      `json:"x509_svids"`
	FirstX509SVID   *time.Time `json:"first_x509_svid_not_after"`
	MedianX509SVID  *time.Time `json:"median_x509_svid_not_after"`
	JWTSVIDs        int32      `json:"jwt_svids"`
	FirstJWTSVID    *time.Time `json:"first_jwt_svid_not_after"`
	LastJWTSVID     *time.Time `json:"last_jwt_svid_not_after"`
	Policy          uint64     `json:"policy_generation"`
	PolicyEnd       *time.Time `json:"policy_not_after"`
	RevocationsEnd  *time.Time `json:"revocations_stale_at"`
	OnStale         string     `json:"on_stale"`
	OwnSVID         *time.Time `json:"own_svid_not_after"`
	SurvivesRestart bool       `json:"survives_restart"`
}

type checkJSON struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

func doctorCommand(o *options) *cobra.Command {
	var expiring time.Duration
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Show whether this node is well, and how long it goes on without the CA",
		Long: `Asks the agent of this node, over its admin socket, what ends when if the CA
died now (the outage budget), and checks the node. Exit status 3: a check failed,
or with --fail-if-expiring something ends sooner than that.`,
		Example: `  merlon doctor
  merlon doctor --fail-if-expiring 15m`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if expiring < 0 {
				return usageError{fmt.Sprintf("--fail-if-expiring %v is less than nothing", expiring), "merlon doctor --fail-if-expiring 15m"}
			}
			return o.withAgent(func(agent agentpb.DebugClient) error {
				s, err := agent.Status(cmd.Context(), &agentpb.StatusRequest{})
				if err != nil {
					return err
				}
				out := examine(s, dialSocket(s.GetPublicSocket()), expiring)
				if err := printDoctor(cmd.OutOrStdout(), o, out); err != nil {
					return err
				}
				if !out.Healthy {
					return silentError{exitUnhealthy}
				}
				return nil
			})
		},
	}
	cmd.Flags().DurationVar(&expiring, "fail-if-expiring", 0, "fail if an X509-SVID, the policy or the agent's own SVID ends within this `duration`")
	return cmd
}

// dialSocket says whether somebody listens at path.
func dialSocket(path string) error {
	conn, err := net.DialTimeout("unix", path, 5*time.Second)
	if err != nil {
		return err
	}
	return conn.Close()
}

// examine judges what the agent said; socket is how its public socket answered.
func examine(s *agentpb.StatusResponse, socket error, expiring time.Duration) doctorJSON {
	now := s.GetNow().AsTime()
	out := doctorJSON{AgentID: s.GetAgentId(), Healthy: true, Budget: budgetJSON{
		Now: now, X509SVIDs: s.GetX509SvidCount(), FirstX509SVID: timeOf(s.GetFirstX509SvidNotAfter()), MedianX509SVID: timeOf(s.GetMedianX509SvidNotAfter()),
		JWTSVIDs: s.GetJwtSvidCount(), FirstJWTSVID: timeOf(s.GetFirstJwtSvidNotAfter()), LastJWTSVID: timeOf(s.GetLastJwtSvidNotAfter()),
		Policy: s.GetPolicyGeneration(), PolicyEnd: timeOf(s.GetPolicyNotAfter()), OnStale: s.GetOnStale(),
		OwnSVID: timeOf(s.GetOwnSvidNotAfter()), SurvivesRestart: s.GetKeysCached() && s.GetCacheFault() == "" && s.GetCacheSavedAt() != nil,
	}}
	if heard := timeOf(s.GetHeardAt()); heard != nil {
		end := heard.Add(s.GetRevocationMaxAge().AsDuration())
		out.Budget.RevocationsEnd = &end
	}
	out.Checks = slices.Concat(
		checkSocket(s, socket), checkCA(s), checkClock(s), checkOwn(s, now, expiring), checkEntries(s),
		checkExpiring(s, now, expiring), checkCache(s), checkDisk(s),
	)
	for _, c := range out.Checks {
		out.Healthy = out.Healthy && c.OK
	}
	return out
}

func verdict(name string, ok bool, good, bad, hint string) []checkJSON {
	if ok {
		return []checkJSON{{Name: name, OK: true, Message: good}}
	}
	return []checkJSON{{Name: name, Message: bad, Hint: hint}}
}

// checkSocket names a socket that is not for every user, which may be meant so.
func checkSocket(s *agentpb.StatusResponse, err error) []checkJSON {
	good := s.GetPublicSocket() + " takes connections"
	if closed := unixsock.Passable(s.GetPublicSocket()); closed != nil {
		good += fmt.Sprintf(", but not of every user: %v", closed)
	}
	return verdict("socket", err == nil, good, fmt.Sprintf("%s does not: %v", s.GetPublicSocket(), err),
		"is public_socket the one that systemd opened, and its directory there?")
}

func checkCA(s *agentpb.StatusResponse) []checkJSON {
	return verdict("ca", s.GetCaFault() == "", "changes arrive from "+s.GetCaAddress(), s.GetCaFault(),
		"the agent's log says why; on the CA: merlon agent show "+strings.TrimPrefix(agentName(s.GetAgentId()), "/"))
}

func checkClock(s *agentpb.StatusResponse) []checkJSON {
	if s.GetClockAhead() == nil {
		return nil // the CA has not spoken; checkCA says so
	}
	off := s.GetClockAhead().AsDuration()
	direction := "ahead of"
	if off < 0 {
		direction = "behind"
	}
	words := fmt.Sprintf("the clock is %v %s the CA's", off.Abs().Round(time.Millisecond), direction)
	return verdict("clock", off.Abs() <= maxClockAhead, words, words, "synchronize the clocks of both machines (NTP): SVIDs would be refused as not valid yet, or as expired")
}

func checkOwn(s *agentpb.StatusResponse, now time.Time, expiring time.Duration) []checkJSON {
	end := s.GetOwnSvidNotAfter()
	switch {
	case end == nil:
		return verdict("agent_svid", false, "", "the node is not attested", "the agent's log says why; it may need a join token: merlon token create")
	case !now.Add(expiring).Before(end.AsTime()):
		return verdict("agent_svid", false, "", "the agent's own SVID "+ending(end, now), "while the CA is reached it is renewed at half of its life; after its end the agent comes back by itself, for agent_recovery after it was issued; later: merlon token create")
	}
	return verdict("agent_svid", true, "the agent's own SVID ends "+when(end, now), "", "")
}

func checkEntries(s *agentpb.StatusResponse) []checkJSON {
	n := s.GetEntriesWithoutSvidCount()
	return verdict("entries", n == 0, fmt.Sprintf("%d entries, and nobody waits for an SVID", s.GetEntryCount()),
		fmt.Sprintf("processes wait for an SVID of %d entries: %s", n, strings.Join(s.GetEntriesWithoutSvid(), ", ")),
		"the agent's log says why they were not issued; merlon entry show ID")
}

// checkExpiring looks at what others rely on.
func checkExpiring(s *agentpb.StatusResponse, now time.Time, expiring time.Duration) []checkJSON {
	if expiring == 0 {
		return nil
	}
	var soon []string
	for _, end := range []struct {
		what string
		at   *timestamppb.Timestamp
	}{{"the first X509-SVID", s.GetFirstX509SvidNotAfter()}, {"the policy", s.GetPolicyNotAfter()}} {
		if end.at != nil && !now.Add(expiring).Before(end.at.AsTime()) {
			soon = append(soon, end.what+" ends "+when(end.at, now))
		}
	}
	return verdict("expiring", len(soon) == 0, fmt.Sprintf("nothing ends within %v", expiring), strings.Join(soon, "; "), "SVIDs are renewed at half of their life: look at the check of the CA")
}

func checkCache(s *agentpb.StatusResponse) []checkJSON {
	sealed := "sealed under " + s.GetSealedUnder()
	if !s.GetKeyConfigured() {
		sealed += ", which lies beside it (key_file puts it elsewhere)"
	}
	if !s.GetKeysCached() {
		sealed += ", without SVIDs and keys (cache_keys: never)"
	}
	bad := cmp.Or(s.GetCacheFault(), "nothing is on the disk yet")
	return verdict("cache", s.GetCacheFault() == "" && s.GetCacheSavedAt() != nil, "what is served is on the disk, "+sealed, "a restart without the CA would lose what changed: "+bad,
		"see that the agent can write "+s.GetDataDir())
}

func checkDisk(s *agentpb.StatusResponse) []checkJSON {
	words := fmt.Sprintf("%d MiB are free in %s", s.GetFreeBytes()>>20, s.GetDataDir())
	return verdict("disk", s.GetFreeBytes() >= minFreeBytes, words, words, "make room: an agent that cannot write forgets with its next restart")
}

// agentName is what follows /agent/ in an agent's SPIFFE ID.
func agentName(id string) string {
	_, name, _ := strings.Cut(id, "/agent/")
	return name
}

// ending is when something ends, or did.
func ending(ts *timestamppb.Timestamp, now time.Time) string {
	if ts.AsTime().After(now) {
		return "ends " + when(ts, now)
	}
	return "ended " + when(ts, now)
}

// when is a time as people count it from now.
func when(ts *timestamppb.Timestamp, now time.Time) string {
	if ts == nil {
		return "-"
	}
	at := ts.AsTime()
	left := at.Sub(now).Round(time.Second)
	if left < 0 {
		return fmt.Sprintf("%v ago (%s)", -left, at.Format(time.RFC3339))
	}
	return fmt.Sprintf("in %v (%s)", left, at.Format(time.RFC3339))
}

func printDoctor(w io.Writer, o *options, out doctorJSON) error {
	if o.output == "json" {
		return printJSON(w, out)
	}
	b := out.Budget
	x509, jwt := "none", "none"
	if b.FirstX509SVID != nil {
		x509 = fmt.Sprintf("%s, of %d", when(timestamppb.New(*b.FirstX509SVID), b.Now), b.X509SVIDs)
	}
	if b.LastJWTSVID != nil {
		jwt = fmt.Sprintf("%d, the last ends %s", b.JWTSVIDs, when(timestamppb.New(*b.LastJWTSVID), b.Now))
	}
	ends := func(at *time.Time, none string) string {
		if at == nil {
			return none
		}
		return when(timestamppb.New(*at), b.Now)
	}
	fmt.Fprintf(w, "If the CA died now, of what %s has would end:\n", cmp.Or(out.AgentID, "this agent, which is not attested,"))
	policy := "none: every call is denied"
	if b.Policy > 0 {
		policy = fmt.Sprintf("generation %d, ends %s", b.Policy, ends(b.PolicyEnd, "never"))
	}
	if err := printFields(w,
		"  first X509-SVID", x509,
		"  median X509-SVID", ends(b.MedianX509SVID, "none"),
		"  cached JWT-SVIDs", jwt,
		"  policy", policy,
		"  revocations", fmt.Sprintf("stale %s, then on_stale: %s", ends(b.RevocationsEnd, "already"), b.OnStale),
		"  agent's own SVID", ends(b.OwnSVID, "none"),
		"  over a restart", map[bool]string{true: "the same", false: "no SVIDs"}[b.SurvivesRestart],
	); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, c := range out.Checks {
		mark := "ok  "
		if !c.OK {
			mark = "FAIL"
		}
		fmt.Fprintf(w, "%s  %-10s  %s\n", mark, c.Name, c.Message)
		if c.Hint != "" {
			fmt.Fprintf(w, "      hint: %s\n", c.Hint)
		}
	}
	return nil
}
