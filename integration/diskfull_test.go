// What a CA on a full disk looks like from outside: nothing is changed, what
// there is goes on, and with space it all comes back without a restart.

package integration_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"merlon.dev/integration/stage"
)

// moveTo restarts the domain's CA with its data on another disk, where it keeps
// 4 MiB free.
func moveTo(t *testing.T, d *stage.Domain, disk string) {
	t.Helper()
	d.CA.Stop()
	data := filepath.Join(disk, "ca-data")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", setting(t, d, "data_dir"), data).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d.CA.Args = append(d.CA.Args, "-data-dir", data, "-disk-reserve-mib", "4")
	d.CA.Restart()
	answers(t, d)
}

func answers(t *testing.T, d *stage.Domain) {
	t.Helper()
	stage.Eventually(t, "the CA answers", func() error {
		_, _, err := d.Try("agent", "list")
		return err
	})
}

// setting is a value of the CA's configuration file.
func setting(t *testing.T, d *stage.Domain, key string) string {
	t.Helper()
	return settingOf(t, d.CA, key)
}

// settingOf is a value of the configuration file that p was started with.
func settingOf(t *testing.T, p *stage.Process, key string) string {
	t.Helper()
	config, err := os.ReadFile(p.Args[1])
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(config)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), key+": "); ok {
			return value
		}
	}
	t.Fatalf("no %s in %s", key, p.Args[1])
	return ""
}

// wantReadOnly checks that nothing can be changed, that the operator is told
// why, and that what only reads goes on.
func wantReadOnly(t *testing.T, d *stage.Domain, reason string) {
	t.Helper()
	stage.Eventually(t, "writes are refused", func() error {
		_, stderr, err := d.Try("entry", "create", "--spiffe-id", d.ID("/refused"), "--parent", d.ID("/agent/x"), "--selector", "unix:uid:1")
		if err == nil {
			return errors.New("an entry was created")
		}
		if !strings.Contains(stderr, "store is read-only") || !strings.Contains(stderr, reason) {
			return fmt.Errorf("merlon says %q", stderr)
		}
		return nil
	})
	d.Merlon("trust", "show")
	d.Merlon("entry", "list")
	stage.Eventually(t, "/ready says why", func() error { return ready(t, d, http.StatusServiceUnavailable, reason) })
}

// begunActs counts the beginnings of acts in the audit log.
func begunActs(t *testing.T, d *stage.Domain) int {
	t.Helper()
	i := slices.Index(d.CA.Args, "-data-dir")
	log, err := os.ReadFile(filepath.Join(d.CA.Args[i+1], "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(log, []byte(`"detail":"begin to create entry`))
}

func ready(t *testing.T, d *stage.Domain, code int, text string) error {
	t.Helper()
	resp, err := http.Get("http://" + setting(t, d, "health_address") + "/ready") //nolint:forbidigo,noctx // loopback
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != code || !strings.Contains(string(body), text) {
		return fmt.Errorf("/ready: %d %s, %v; want %d and %q", resp.StatusCode, body, err, code, text)
	}
	return nil
}

// wantWritable waits until entries can be created again.
func wantWritable(t *testing.T, d *stage.Domain) {
	t.Helper()
	stage.Eventually(t, "writes go on", func() error {
		_, stderr, err := d.Try("entry", "create", "--spiffe-id", d.ID("/later"), "--parent", d.ID("/agent/x"), "--selector", "unix:uid:1")
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	stage.Eventually(t, "the CA is ready", func() error { return ready(t, d, http.StatusOK, "") })
}

// wantNewSVID restarts the agent, which renews its own SVID and has the
// workload's issued anew.
func wantNewSVID(t *testing.T, d *stage.Domain) {
	t.Helper()
	before, err := fetch(t, d)
	if err != nil {
		t.Fatal(err)
	}
	d.Agent.Stop()
	if err := os.Remove(filepath.Join(settingOf(t, d.Agent, "data_dir"), "cache.sealed")); err != nil { // it would serve what it has kept
		t.Fatal(err)
	}
	d.Agent.Restart()
	stage.Eventually(t, "an SVID is issued", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		now, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(d.WorkloadAPI))
		if err == nil && now.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) == 0 {
			err = errors.New("the old one is served")
		}
		return err
	})
}

// issueUntilRefused has JWT-SVIDs issued until that is refused.
func issueUntilRefused(t *testing.T, d *stage.Domain) (n int, refused error) {
	t.Helper()
	for ; n < 10_000; n++ {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprintf("aud-%d-%d", time.Now().UnixNano(), n)}, workloadapi.WithAddr(d.WorkloadAPI))
		cancel()
		if err != nil {
			return n, err
		}
	}
	t.Fatal("issuance goes on for ever on a full disk")
	return 0, nil
}

func TestFullDiskMakesTheCAReadOnly(t *testing.T) {
	disk := stage.SmallDisk(t, "size=160m")
	d := stage.Separate(t)
	d.Entry("/me", "--ttl", "1h")
	d.Merlon("policy", "push", "../examples/quickstart/policy")
	moveTo(t, d, disk)
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })

	empty := stage.FillDisk(t, disk)
	wantReadOnly(t, d, "free some space there")
	// Whoever goes on trying uses up nothing of what is set aside for issuing.
	begun := begunActs(t, d)
	for range 10 {
		if _, _, err := d.Try("entry", "create", "--spiffe-id", d.ID("/refused"), "--parent", d.ID("/agent/x"), "--selector", "unix:uid:1"); err == nil {
			t.Error("an entry was created")
		}
	}
	if now := begunActs(t, d); now > begun {
		t.Errorf("%d refused acts are in the audit log; want none", now-begun)
	}
	wantNewSVID(t, d)
	n, refused := issueUntilRefused(t, d)
	if n < 100 {
		t.Errorf("%d JWT-SVIDs were issued on a full disk; want some hundred, then %v", n, refused)
	}
	stage.Eventually(t, "/ready says that issuance has stopped", func() error {
		return ready(t, d, http.StatusServiceUnavailable, "audit log is full")
	})
	if _, err := fetch(t, d); err != nil {
		t.Errorf("the SVID that there is: %v", err)
	}
	d.Merlon("trust", "show")

	empty()
	wantWritable(t, d)
	if _, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "again"}, workloadapi.WithAddr(d.WorkloadAPI)); err != nil {
		t.Errorf("a JWT-SVID once there is space: %v", err)
	}
	wantNewSVID(t, d)
	if by, ended := d.CA.Ended(); ended {
		t.Fatalf("the CA has ended by itself, by signal %d (0: none):\n%s", by, d.CA.Log())
	}

	// A stop on a full disk ends, and loses nothing.
	entries := d.Merlon("entry", "list", "-o", "json")
	empty = stage.FillDisk(t, disk)
	d.CA.Stop()
	empty()
	d.CA.Restart()
	answers(t, d)
	if got := d.Merlon("entry", "list", "-o", "json"); got != entries {
		t.Errorf("entries after a stop on a full disk = %s; want %s", got, entries)
	}
}

func TestDiskWithoutInodesMakesTheCAReadOnly(t *testing.T) {
	disk := stage.SmallDisk(t, "size=160m,nr_inodes=2000")
	d := stage.Separate(t)
	d.Entry("/me", "--ttl", "1h")
	moveTo(t, d, disk)
	stage.Eventually(t, "an SVID is served", func() error { _, err := fetch(t, d); return err })
	empty := stage.TakeInodes(t, disk)
	wantReadOnly(t, d, "inodes free")
	wantNewSVID(t, d)
	empty()
	wantWritable(t, d)
}
