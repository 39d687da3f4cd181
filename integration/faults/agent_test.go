package faults_test

// Rows about the agent: R5, R12.

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults"
	"merlon.dev/integration/faults/history"
)

// killAgent is R5.
func killAgent(r *run) {
	w := faults.New(r, faults.Setup{})
	registerMe(r, w)
	w.Peers()
	w.Work(4)
	var before *x509svid.SVID
	r.must("an SVID is served", func() (err error) { before, err = fetch(w); return err })
	for i := range r.size(3, 200) {
		time.Sleep(time.Duration(w.Rng.IntN(500)) * time.Millisecond)
		restartAgent(r, w, "the agent serves again")
		if i == 0 {
			w.Deny()
		}
	}
	// The same while nobody can issue anything: what is served was kept.
	r.must("the agent holds what it served", func() (err error) { before, err = fetch(w); return err })
	away := w.Rec.Break("the CA is away")
	w.CA.Kill()
	restartAgent(r, w, "the agent serves what it has kept")
	if now, err := fetch(w); err != nil || now.Certificates[0].SerialNumber.Cmp(before.Certificates[0].SerialNumber) != 0 {
		r.Errorf("while the CA is away the restarted agent serves %v, %v; want the SVID that it had", now, err)
	}
	noKeyIn(r, w.AgentData(), before)
	w.RestartCA(r.bound(readyWithin))
	away()
	back := history.Now()
	r.must("peers call each other", func() error { return w.PeersCall(back) })
	r.verdict(w)
}

// registerMe makes this very process a workload.
func registerMe(r *run, w *faults.World) {
	r.Helper()
	exe, err := os.Executable()
	if err != nil {
		r.Fatal(err)
	}
	w.Register("/me", w.AgentID(), "path:"+exe)
}

// restartAgent kills the agent and notes how long its Workload API was away.
func restartAgent(r *run, w *faults.World, what string) {
	mended := w.Rec.Break("SIGKILL of the agent")
	w.Agent.Kill()
	w.Agent.Restart()
	mended()
	w.Until(what, r.bound(time.Second), func() error { _, err := fetch(w); return err })
}

// fetch asks the Workload API for the SVID of this very process.
func fetch(w *faults.World) (*x509svid.SVID, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	return workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(w.WorkloadAPI))
}

// noKeyIn looks for the SVID's private key in all files of a folder, as the number
// that it is.
func noKeyIn(r *run, dir string, svid *x509svid.SVID) {
	key, ok := svid.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		r.Fatalf("the key is a %T", svid.PrivateKey)
	}
	secret, err := key.Bytes()
	if err != nil {
		r.Fatal(err)
	}
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err == nil && bytes.Contains(text, secret) {
			err = fmt.Errorf("%s holds the private key of %s", path, svid.ID)
		}
		files++
		return err
	})
	if err != nil || files == 0 {
		r.Errorf("look for the key in %d files: %v", files, err)
	}
}

// spoilPolicy is R12. What a signed bundle that was tampered with does, and a bundle
// of another generation, policy/bundle and agent/internal/policyfeed show; here is what
// an operator and a disk can do, while calls are decided.
func spoilPolicy(r *run) {
	w := faults.New(r, faults.Setup{})
	registerMe(r, w)
	w.Peers()
	w.Work(2)
	time.Sleep(300 * time.Millisecond)
	w.Deny()
	w.Rest()
	before := w.Generation()
	mended := w.Rec.Break("policy bundles that are none")
	for name, raw := range spoiled(r, w.Policy()) {
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
	// The agent's own copy, with which it would go on.
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
	r.verdict(w)
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
