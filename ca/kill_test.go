// The CA as a real process that is killed: what was acknowledged is there.

package ca_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"merlon.dev/ca"
	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/audit"
	"merlon.dev/ca/internal/config"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk/unixsock"
)

// runAsCA makes the test binary a merlon-ca: building the real one would take
// longer than the test.
const runAsCA = "MERLON_TEST_RUN_AS_CA"

func TestMain(m *testing.M) {
	if os.Getenv(runAsCA) != "" {
		os.Exit(runCA()) //nolint:forbidigo // as the main of merlon-ca does
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		stage.RemoveBins()
		os.Exit(code) //nolint:forbidigo // in place of goleak
	}))
}

// runCA is main of merlon-ca in short.
func runCA() int {
	cl, err := config.ParseCommandLine(os.Args[1:], os.Getenv, os.Stderr)
	if err != nil {
		return 2
	}
	cl.Config.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	s, err := ca.New(cl.Config)
	if err != nil {
		return 2
	}
	if err := s.Run(context.Background()); err != nil {
		cl.Config.Logger.Error("run", slog.Any("err", err))
		return 1
	}
	return 0
}

// startProcess runs merlon-ca, with more flags, and returns a client of its admin
// socket.
func startProcess(t *testing.T, dir string, more ...string) (*exec.Cmd, capb.AdminClient) {
	t.Helper()
	socket := filepath.Join(dir, "s", "a.sock")
	flags := []string{
		"-trust-domain", "shop.test", "-data-dir", filepath.Join(dir, "data"), "-admin-socket", socket,
		"-address", "127.0.0.1:0", "-https-address", "127.0.0.1:0", "-health-address", "127.0.0.1:0", "-development", "-log-level", "warn",
	}
	cmd := exec.Command(os.Args[0], append(flags, more...)...)
	cmd.Env = append(os.Environ(), runAsCA+"=1")
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() }) // most often gone already
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(unixsock.ClientCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	admin := capb.NewAdminClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		_, err := admin.ListAgents(ctx, &capb.ListAgentsRequest{}, grpc.WaitForReady(true))
		if err == nil {
			return cmd, admin
		}
		if ctx.Err() != nil {
			t.Fatalf("merlon-ca does not come up: %v", err)
		}
	}
}

func TestKilledCAComesBackWithAllItAcknowledged(t *testing.T) {
	dir := tempDir(t)
	acknowledged := make(map[string]bool)
	var generation uint64
	for round := range 3 {
		cmd, admin := startProcess(t, dir)
		list, err := admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		found := make(map[string]bool)
		for _, e := range list.GetEntries() {
			found[e.GetEntryId()] = true
		}
		for id := range acknowledged {
			if !found[id] {
				t.Errorf("round %d: acknowledged entry %s is lost", round, id)
			}
		}
		pushed, err := admin.PushPolicy(t.Context(), &capb.PushPolicyRequest{Bundle: policyBundle(t)})
		if err != nil {
			t.Fatal(err)
		}
		if pushed.GetGeneration() != generation+1 {
			t.Errorf("round %d: generation %d after %d", round, pushed.GetGeneration(), generation)
		}
		generation = pushed.GetGeneration()
		kill := time.AfterFunc(100*time.Millisecond, func() { _ = cmd.Process.Kill() })
		for {
			resp, err := admin.CreateEntry(t.Context(), &capb.CreateEntryRequest{Entry: newEntry("n1", "web")})
			if err != nil {
				break
			}
			acknowledged[resp.GetEntry().GetEntryId()] = true
		}
		kill.Stop()
		_ = cmd.Wait() // killed, as it should be
	}
	if len(acknowledged) == 0 {
		t.Error("no entry was acknowledged in three rounds")
	}
	checkNothingUnrecorded(t, dir)
}

// checkNothingUnrecorded compares the entries of a CA that was killed with its
// log: each has the record of its making, or that of its beginning.
func checkNothingUnrecorded(t *testing.T, dir string) {
	t.Helper()
	cmd, admin := startProcess(t, dir)
	list, err := admin.ListEntries(t.Context(), &capb.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed, as it should be
	path := filepath.Join(dir, "data", "audit.jsonl")
	recorded := make(map[string]bool)
	for line, err := range audit.Lines(path, 1) {
		var r audit.Record
		if err := errors.Join(err, json.Unmarshal(line.Text, &r)); err != nil {
			t.Fatal(err)
		}
		recorded[r.EntryID] = true
	}
	r, err := audit.Verify(path)
	if err != nil {
		t.Fatal(err)
	}
	unrecorded := slices.DeleteFunc(list.GetEntries(), func(e *capb.Entry) bool { return recorded[e.GetEntryId()] })
	if len(unrecorded) > len(r.Unfinished) {
		t.Errorf("%d entries have no record of their making, and %d acts are unfinished", len(unrecorded), len(r.Unfinished))
	}
}
