package faults_test

// R12: policy that is spoilt, on its way in, on its way to an agent, or kept, while a
// service decides a thousand times a second.

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/stage"
	"merlon.dev/policy/bundle"
)

// spoilsEnv names the file whose content a spoiling CA serves as the policy bundle,
// where there is one.
const spoilsEnv = "MERLON_SPOILS"

// spoilingCA serves agents what a file holds, and not the policy bundle.
func spoilingCA(r *run) string {
	const written = "\t\t_, _ = w.Write(p.Raw) //nolint"
	return stage.Changed(r, "merlon-ca-spoiling", "ca/cmd/merlon-ca",
		stage.Change{
			File: "policy/bundle/server.go", Old: "\th.Set(\"Content-Length\", strconv.Itoa(len(p.Raw)))\n",
			New: "\traw := p.Raw\n\tif other, err := os.ReadFile(os.Getenv(\"" + spoilsEnv + "\")); err == nil {\n\t\traw = other\n\t}\n\th.Set(\"Content-Length\", strconv.Itoa(len(raw)))\n",
		},
		stage.Change{File: "policy/bundle/server.go", Old: written, New: strings.Replace(written, "p.Raw", "raw", 1)},
		stage.Change{File: "policy/bundle/server.go", Old: "import (\n", New: "import (\n\t\"os\"\n"},
	)
}

// spoilPolicy is R12. By an earlier policy somebody could call who cannot any more:
// what is spoilt holds that, and must not come back.
func spoilPolicy(r *run) {
	spoils := filepath.Join(r.TempDir(), "spoils")
	setup := faults.Setup{Decide: r.size(200, 1200), Env: []string{spoilsEnv + "=" + spoils}}
	if r.full {
		setup.CA = spoilingCA(r)
	}
	w := faults.New(r, setup)
	former := w.FormerPolicy()
	pushed(r, w, former)
	older, err := w.Admin(0).FetchPolicy(r.Context(), &capb.FetchPolicyRequest{Generation: w.Generation()})
	if err != nil {
		r.Fatal(err)
	}
	pushed(r, w, w.Policy())
	registerMe(r, w)
	w.Peers()
	w.Work(2)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	w.Rest()
	r.must("decisions are made", func() error {
		if w.Snapshot().Count()["decide ok"] == 0 {
			return errors.New("none yet")
		}
		return nil
	})
	began := history.Now()
	pushSpoilt(r, w, former)
	if r.full {
		serveSpoilt(r, w, spoils, former, older.GetBundle())
	}
	spoilCopy(r, w)
	decided(r, w, began, setup.Decide)
	r.verdict(w)
}

// pushed has the CA take a policy, beside what the history has.
func pushed(r *run, w *faults.World, unsigned []byte) {
	r.Helper()
	if _, err := w.Admin(0).PushPolicy(r.Context(), &capb.PushPolicyRequest{Bundle: unsigned}); err != nil {
		r.Fatal(err)
	}
}

// decided holds the decisions since some time against what they should have been.
func decided(r *run, w *faults.World, since int64, rate int) {
	r.Helper()
	all, slowest := 0, 0.0
	for _, op := range w.Rec.History().Ops {
		if op.Kind != history.Decide || op.Begin < since {
			continue
		}
		if op.Outcome != history.OK {
			r.Errorf("a wrong decision: %s", op.Detail)
		}
		all += int(op.Number)
		took := time.Duration(op.End - op.Begin).Seconds()
		if slowest == 0 || float64(op.Number)/took < slowest {
			slowest = float64(op.Number) / took
		}
	}
	mean := float64(all) / time.Duration(history.Now()-since).Seconds()
	r.number("decisions", fmt.Sprintf("%d of a service, %.0f a second, in the slowest second %.0f (%d are asked for)", all, mean, slowest, rate))
	if all == 0 || r.full && mean < 1000 {
		r.Errorf("%d decisions, %.0f a second; want 1000 a second, or the row shows little", all, mean)
	}
}

// pushSpoilt is what an operator can do.
func pushSpoilt(r *run, w *faults.World, former []byte) {
	before := w.Generation()
	mended := w.Rec.Break("policy bundles that are none")
	for name, raw := range spoiled(r, former) {
		for range r.size(1, 50) {
			_, err := w.Admin(0).PushPolicy(context.Background(), &capb.PushPolicyRequest{Bundle: raw})
			if code := status.Code(err); code != codes.InvalidArgument && code != codes.ResourceExhausted {
				r.Errorf("%s: %v; want it to be refused as invalid", name, err)
			}
		}
	}
	mended()
	if now := w.Generation(); now != before {
		r.Errorf("generation %d is in force; want %d still", now, before)
	}
}

// serveSpoilt is what a CA, or who stands in for it, can do (T26 to T29): it announces a
// new generation, and serves something else.
func serveSpoilt(r *run, w *faults.World, spoils string, former, older []byte) {
	flipped := slices.Clone(older)
	flipped[len(flipped)/2] ^= 0x10
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		r.Fatal(err)
	}
	foreign, err := bundle.Sign(former, bundle.Metadata{Name: "main", TrustDomain: w.TrustDomain, Generation: 1 << 30, IssuedAt: time.Now()}, "somebody", key)
	if err != nil {
		r.Fatal(err)
	}
	served := map[string][]byte{
		"signed, and older": older, "signed, with a flipped bit": flipped, "signed by somebody else": foreign, "not signed": former,
	}
	maps.Copy(served, spoiled(r, former))
	for name, raw := range served {
		mended := w.Rec.Break("the CA serves a policy bundle: " + name)
		if err := os.WriteFile(spoils, raw, 0o600); err != nil {
			r.Fatal(err)
		}
		refusals := refusalsOf(w)
		pushed(r, w, w.Policy())
		r.must(name+": the agent refuses it, and says so", func() error {
			if refusalsOf(w) <= refusals {
				return errors.New("silent")
			}
			return nil
		})
		time.Sleep(time.Second)
		os.Remove(spoils)
		actives := strings.Count(w.Agent.Log(), "policy active")
		pushed(r, w, w.Policy())
		w.Until("the agent takes the next good policy bundle", r.bound(15*time.Second), func() error {
			if strings.Count(w.Agent.Log(), "policy active") <= actives {
				return errors.New("not yet")
			}
			return nil
		})
		mended()
	}
	r.number("kinds of policy bundles that an agent was served, and refused", len(served))
}

func refusalsOf(w *faults.World) int {
	return strings.Count(w.Agent.Log(), "policy bundle not loaded; the last good one stays")
}

// spoilCopy is what a disk can do to the agent's own copy, with which it would go on.
func spoilCopy(r *run, w *faults.World) {
	kept := filepath.Join(w.AgentData(), "cache.sealed")
	damaged := w.Rec.Break("the agent's copy is damaged")
	w.Agent.Kill()
	text, err := os.ReadFile(kept)
	if err != nil {
		r.Fatal(err)
	}
	text[len(text)/2] ^= 1
	if err := os.WriteFile(kept, text, 0o600); err != nil {
		r.Fatal(err)
	}
	w.Agent.Restart()
	w.Until("the agent serves what the CA has", r.bound(5*time.Second), func() error { _, err := fetch(w); return err })
	if !strings.Contains(w.Agent.Log(), "set aside") {
		r.Error("the log of the agent does not say that its copy was damaged")
	}
	damaged()
	// No copy, and no CA: services go on by what was compiled for them.
	gone := w.Rec.Break("the agent has no policy, and no CA")
	w.CA.Kill()
	w.Agent.Kill()
	if err := os.RemoveAll(kept); err != nil { // it may not have been written again yet
		r.Fatal(err)
	}
	w.Agent.Restart()
	since := history.Now()
	w.Until("peers call each other without it", r.bound(5*time.Second), func() error { return w.PeersCall(since) })
	time.Sleep(time.Second)
	gone()
	w.RestartCA(r.bound(readyWithin))
	w.Until("the agent is connected", r.bound(20*time.Second), w.Connected)
}

// spoiled are policy bundles that no CA takes.
func spoiled(r *run, good []byte) map[string][]byte {
	r.Helper()
	flipped := slices.Clone(good)
	flipped[len(flipped)/2] ^= 0x10
	return map[string][]byte{
		"nothing": nil, "half of one": good[:len(good)/2], "a flipped bit": flipped, "garbage": []byte(strings.Repeat("policy", 1000)),
		"a bomb":                  packed(r, "grants.yaml", make([]byte, r.size(32, 256)<<20)),
		"a built-in that asks":    packed(r, "own.rego", []byte("package authz\n\nallow if http.send({\"method\": \"GET\", \"url\": \"http://169.254.169.254/\"}).status_code == 200\n")),
		"a file outside":          packed(r, "../grants.yaml", []byte("grants: []\n")),
		"grants that are no YAML": packed(r, "grants.yaml", []byte("grants: [}")),
	}
}

// packed is a gzipped tar of one file.
func packed(r *run, name string, content []byte) []byte {
	r.Helper()
	var out bytes.Buffer
	zipped := gzip.NewWriter(&out)
	archive := tar.NewWriter(zipped)
	err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content)), Typeflag: tar.TypeReg})
	if err == nil {
		_, err = archive.Write(content)
	}
	if err := errors.Join(err, archive.Close(), zipped.Close()); err != nil {
		r.Fatal(err)
	}
	return out.Bytes()
}
