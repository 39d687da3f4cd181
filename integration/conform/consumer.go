// Bundle consumers: a bundle endpoint serves crafted trust bundles in turn, and after
// each the consumer is asked what it has now (Trust domain and bundle §4, Federation §4
// and §5).

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/sdk/svid/forge"
)

// The trust domains that the consumer is told to follow, by one profile each.
const (
	webDomain    = "web.conform.test"
	spiffeDomain = "spiffe.conform.test"
	endpointPath = "/endpoint" // of the https_spiffe server's SPIFFE ID
)

// polls is the exit code of a driver that cannot have its consumer fetch.
const polls = 2

// driver is the program that stands for the consumer. It is called with
//
//	follow TRUST_DOMAIN https_web URL CA_FILE
//	follow TRUST_DOMAIN https_spiffe URL SPIFFE_ID BUNDLE_FILE
//	refresh TRUST_DOMAIN    fetch now; exit code 2: it comes by itself
//	show TRUST_DOMAIN       print what is known, as JWKS; nothing: there is no bundle
type driver struct {
	program string
	// wait is how long a consumer that comes by itself may stay away.
	wait time.Duration
}

func (d driver) call(ctx context.Context, args ...string) (stdout string, code int, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.program, args...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		return out.String(), exit.ExitCode(), fmt.Errorf("%s %s: %w: %s", d.program, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), 0, err
}

// held is what a consumer has of a trust domain: names of keys that are served here, or
// what else it has. It is sorted.
type held []string

func (h held) String() string {
	if len(h) == 0 {
		return "nothing"
	}
	return strings.Join(h, ", ")
}

// relation is one trust domain that the consumer follows.
type relation struct {
	*rogue
	driver driver
	names  map[string]string // of keys that are served, by the DER of the certificate or the kid
	// sequence is that of the last document that the consumer should have taken, and
	// has what should be known.
	sequence uint64
	has      held
}

// shows asks the consumer.
func (l *relation) shows(ctx context.Context) (held, error) {
	out, code, err := l.driver.call(ctx, "show", l.td.Name())
	if code != 0 || err == nil && strings.TrimSpace(out) == "" {
		return held{}, nil // there is no bundle
	}
	if err != nil {
		return nil, err
	}
	var set struct {
		Keys []struct {
			Use string   `json:"use"`
			Kid string   `json:"kid"`
			X5C []string `json:"x5c"`
		} `json:"keys"`
	}
	if err := json.Unmarshal([]byte(out), &set); err != nil {
		return nil, fmt.Errorf("%s show %s prints no JWKS: %w", l.driver.program, l.td.Name(), err)
	}
	got := held{}
	for _, k := range set.Keys {
		key := k.Kid
		if k.Use == "x509-svid" {
			key = strings.Join(k.X5C, " ")
		}
		name, ok := l.names[key]
		if !ok {
			name = fmt.Sprintf("a key of use %.20q that nobody has served (kid %.40q)", k.Use, k.Kid)
		}
		got = append(got, name)
	}
	slices.Sort(got)
	return slices.Compact(got), nil
}

// visited waits until the consumer has come, and is done with what it got.
func (l *relation) visited(ctx context.Context, byConnection bool) error {
	_, code, err := l.driver.call(ctx, "refresh", l.td.Name())
	visits := 1 // a refresh that fails is one, too
	switch {
	case code == polls:
		visits = 2 // when it comes again it is done with what it got before
	case code == 0 && err != nil:
		return err
	}
	return waitUntil(ctx, l.driver.wait, fmt.Sprintf("the consumer comes to %s", l.url()), func() bool { return l.visits(byConnection) >= visits })
}

// after serves a, and gives what the consumer has when it is done with that.
func (l *relation) after(ctx context.Context, a answer, byConnection bool) (held, error) {
	l.serve(a)
	if err := l.visited(ctx, byConnection); err != nil {
		return nil, err
	}
	return l.shows(ctx)
}

// ring is the keys that are served: of one trust domain several authorities.
type ring map[string]*forge.Authority

// newRing makes authorities of td by names, and registers them with l.
func newRing(l *relation, td string, names ...string) ring {
	keys := make(ring)
	for _, name := range names {
		a := forge.New(failing{}, td)
		keys[name] = a
		l.names[encodeCert(a)] = name
		l.names[a.KeyID] = name + "'s JWT key"
	}
	return keys
}

// bundle is a document with the root and the JWT key of each name.
func (k ring) bundle(sequence uint64, names ...string) map[string]any {
	doc := map[string]any{"spiffe_sequence": sequence, "spiffe_refresh_hint": 10}
	list := []any{}
	for _, name := range names {
		for _, key := range k.keysOf(name) {
			list = append(list, key)
		}
	}
	doc["keys"] = list
	return doc
}

// keysOf are the JWKs of an authority: first that of X.509.
func (k ring) keysOf(name string) []map[string]any {
	text, err := k[name].Bundle().Marshal()
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	if err == nil {
		err = json.Unmarshal(text, &set)
	}
	if err != nil {
		panic(forgeError{err.Error()})
	}
	slices.SortFunc(set.Keys, func(a, b map[string]any) int { return strings.Compare(fmt.Sprint(b["use"]), fmt.Sprint(a["use"])) })
	return set.Keys
}

// changed is the JWK of a name's X.509 authority with changes; nil takes a member out.
func (k ring) changed(name string, changes map[string]any) map[string]any {
	key := maps.Clone(k.keysOf(name)[0])
	for member, value := range changes {
		key[member] = value
		if value == nil {
			delete(key, member)
		}
	}
	return key
}

// want is what a consumer has of the authorities of these names.
func (k ring) want(names ...string) held {
	out := held{}
	for _, name := range names {
		out = append(out, name, name+"'s JWT key")
	}
	slices.Sort(out)
	return out
}

func encodeJSON(doc any) []byte {
	text, err := json.Marshal(doc)
	if err != nil {
		panic(forgeError{err.Error()})
	}
	return text
}

// checkConsumer makes every check of a bundle consumer.
func checkConsumer(ctx context.Context, r *report, o consumerOptions) (err error) {
	defer func() {
		if e, ok := recover().(forgeError); ok {
			err = e
		}
	}()
	dir, err := os.MkdirTemp("", "spiffe-conform")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	web, err := o.relation(ctx, webDomain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, web.close()) }()
	spiffe, err := o.relation(ctx, spiffeDomain)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, spiffe.close()) }()
	if err := o.checkWeb(ctx, r, web, dir); err != nil {
		return fmt.Errorf("https_web: %w", err)
	}
	if err := o.checkSPIFFE(ctx, r, spiffe, dir); err != nil {
		return fmt.Errorf("https_spiffe: %w", err)
	}
	return checkUnmerged(ctx, r, web, spiffe)
}

// consumerOptions say how the consumer is reached.
type consumerOptions struct {
	driver driver
	// host is where the endpoint is for it.
	host string
	// polling is how long it is watched how often it comes; 0: it is not.
	polling time.Duration
}

func (o consumerOptions) relation(ctx context.Context, td string) (*relation, error) {
	s, err := startRogue(ctx, o.host, spiffeid.RequireTrustDomainFromString(td))
	if err != nil {
		return nil, err
	}
	return &relation{rogue: s, driver: o.driver, names: make(map[string]string)}, nil
}

// checkUnmerged: what was served as one trust domain's is not the other's.
func checkUnmerged(ctx context.Context, r *report, web, spiffe *relation) error {
	for _, l := range []*relation{web, spiffe} {
		got, err := l.shows(ctx)
		if err != nil {
			return err
		}
		r.check("F-5", consumer, failIf(!slices.Equal(got, l.has), "in the end the bundle of %s has %s; want %s, and nothing of the other trust domain's", l.td.Name(), got, l.has))
	}
	return nil
}

// writeFirst writes the bundle that verifies a https_spiffe server at first.
func writeFirst(dir string, b *spiffebundle.Bundle) (string, error) {
	text, err := b.Marshal()
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "first.json")
	return file, os.WriteFile(file, text, 0o600)
}
