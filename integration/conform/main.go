// Command spiffe-conform puts the requirements of the SPIFFE standards to an
// implementation, whichever it is, from outside: its Workload API as a workload, its
// trust bundle endpoint as another trust domain, its validators with forged SVIDs, its
// client of such endpoints with crafted trust bundles.
//
//	spiffe-conform forge DIR                  make forged SVIDs, and a trust bundle for them
//	spiffe-conform run [flags]                check, and print each requirement
//	spiffe-conform corpus                     print the certification paths in x509-limbo's format
//
// It exits with 1 if a MUST is not kept, with 2 for a command that makes no sense, and
// with 3 if something that was named could not be checked: the report is written anyway.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"merlon.dev/integration/conform/pathcase"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

const usage = `spiffe-conform forge DIR     make forged SVIDs, and DIR/bundle.json for the implementation to trust as example.org
spiffe-conform run [flags]   check an implementation; spiffe-conform run -h lists the flags
spiffe-conform corpus        print the certification paths in x509-limbo's format
`

// usageError is a command that makes no sense.
type usageError struct{ what string }

func (e usageError) Error() string { return e.what }

// notKeptError is a number of requirements of level MUST that are not kept.
type notKeptError int

func (e notKeptError) Error() string {
	return fmt.Sprintf("%d requirements of level MUST are not kept", int(e))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := command(ctx, args, stdout, stderr)
	var wrong usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "spiffe-conform: %s\n%s", wrong.what, usage)
		return 2
	}
	fmt.Fprintln(stderr, "spiffe-conform: error:", printable(err.Error()))
	if _, notKept := errors.AsType[notKeptError](err); notKept {
		return 1
	}
	return 3
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "forge":
		return forgeTo(args[1], stderr)
	case len(args) == 1 && args[0] == "corpus":
		return pathcase.WriteLimbo(stdout, pathcase.All(failing{}))
	case len(args) >= 1 && args[0] == "run":
		return check(ctx, args[1:], stdout, stderr)
	case len(args) == 1 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help"):
		_, err := io.WriteString(stdout, usage)
		return err
	case len(args) == 0:
		return usageError{"say what to do"}
	}
	return usageError{fmt.Sprintf("%q: no such command", strings.Join(args, " "))}
}

func forgeTo(dir string, stderr io.Writer) error {
	now := time.Now()
	f, bundle, left, err := makeForgery(now)
	if err != nil {
		return err
	}
	if err := f.write(dir, bundle); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stderr, "%s: %d certification paths and %d tokens, good until %s; %d paths need a trust bundle or a moment of their own and are left out\nhave the implementation trust %s/%s as %s, and run with --forge %s\n",
		dir, len(f.Paths), len(f.Tokens), now.Add(forgedFor).Format("15:04"), len(left), dir, bundleFile, pathcase.TrustDomain, dir)
	return err
}

// options are the flags of run.
type options struct {
	socket, bundleURL, bundleCA, bundleID, forge, server, serve, output, junit string

	consumer, consumerHost string
	consumerWait, polling  time.Duration
}

func (o *options) flags(stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("spiffe-conform run", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.socket, "socket", os.Getenv("SPIFFE_ENDPOINT_SOCKET"), "the Workload API, `unix:///path` (SPIFFE_ENDPOINT_SOCKET); this process needs an identity there")
	fs.StringVar(&o.bundleURL, "bundle-url", "", "the trust bundle endpoint, `https://…`")
	fs.StringVar(&o.bundleCA, "bundle-ca", "", "`FILE` with the CAs of a bundle endpoint of profile https_web, in PEM; without it the system's")
	fs.StringVar(&o.bundleID, "bundle-id", "", "`SPIFFE ID` of a bundle endpoint of profile https_spiffe; verified by the trust bundle of the Workload API")
	fs.StringVar(&o.forge, "forge", "", "`DIR` with forged SVIDs, whose bundle.json the implementation trusts as example.org; for ValidateJWTSVID and --server")
	fs.StringVar(&o.server, "server", "", "`host:port` of a server with mutual TLS and HTTP/1.1, whose validator gets forged X509-SVIDs")
	fs.StringVar(&o.serve, "serve", "", "`host:port` to serve forged X509-SVIDs at: a client that connects again and again, expecting spiffe://example.org/a, is the validator")
	fs.StringVar(&o.consumer, "consumer", "", "`program` that stands for a client of bundle endpoints: it is called with follow, refresh and show (README.md); crafted trust bundles are served to it")
	fs.StringVar(&o.consumerHost, "consumer-host", "127.0.0.1", "`address` of this machine at which the consumer finds what is served")
	fs.DurationVar(&o.consumerWait, "consumer-wait", 30*time.Second, "how `long` the consumer may stay away")
	fs.DurationVar(&o.polling, "polling", 0, "also watch for so `long`, three times, how often the consumer comes by itself")
	fs.StringVar(&o.output, "o", "text", "`text or json`")
	fs.StringVar(&o.junit, "junit", "", "also write JUnit's format to `FILE`")
	return fs
}

// validate refuses what makes no sense.
func (o *options) validate(rest []string) error {
	switch {
	case len(rest) > 0:
		return usageError{fmt.Sprintf("%q: run takes flags only", rest[0])}
	case o.output != "text" && o.output != "json":
		return usageError{fmt.Sprintf("-o %s: text or json", o.output)}
	case o.socket == "" && o.bundleURL == "" && o.server == "" && o.serve == "" && o.consumer == "":
		return usageError{"name something to check: --socket, --bundle-url, --server, --serve or --consumer"}
	case net.ParseIP(o.consumerHost) == nil:
		return usageError{fmt.Sprintf("--consumer-host %s: it is an address, such as 127.0.0.1", o.consumerHost)}
	case o.polling != 0 && o.consumer == "":
		return usageError{"--polling watches a consumer: --consumer names one"}
	case o.polling < 0 || o.consumerWait <= 0:
		return usageError{"--polling and --consumer-wait are no negative times"}
	case (o.server != "" || o.serve != "") && o.forge == "":
		return usageError{"--server and --serve need --forge: spiffe-conform forge DIR makes what is presented"}
	case o.bundleID != "" && o.socket == "":
		return usageError{"--bundle-id needs --socket, whose trust bundle verifies it"}
	}
	return nil
}

func check(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	fs := o.flags(stderr)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return usageError{err.Error()}
	}
	if err := o.validate(fs.Args()); err != nil {
		return err
	}
	r := newReport()
	unchecked := o.checkAll(ctx, r)
	if errors.As(unchecked, new(usageError)) {
		return unchecked
	}
	results := r.list(o.given, o.missing)
	if err := o.report(stdout, results); err != nil {
		return err
	}
	if unchecked != nil {
		return fmt.Errorf("could not check: %w", unchecked)
	}
	if n := mustFailures(results); n > 0 {
		return notKeptError(n)
	}
	return o.passedNothing(results)
}

// report writes results, to a file for JUnit and as text or JSON.
func (o *options) report(stdout io.Writer, results []*result) error {
	if o.junit != "" {
		if err := writeFile(o.junit, results); err != nil {
			return err
		}
	}
	if o.output == "json" {
		return writeJSON(stdout, results)
	}
	return writeText(stdout, results)
}

// passedNothing: a target of which nothing passed has not been checked.
func (o *options) passedNothing(results []*result) error {
	passed := make(map[part]bool)
	for _, res := range results {
		for _, p := range res.Parts {
			passed[p.Part] = passed[p.Part] || p.Status == pass
		}
	}
	for _, of := range []part{api, chains, endpoint, consumer} {
		if o.given(of) && !passed[of] {
			return fmt.Errorf("could not check: of the %s nothing passed", of)
		}
	}
	return nil
}

func writeFile(path string, results []*result) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(writeJUnit(f, results), f.Close())
}

// checkAll checks each target that is named, whatever became of the others. The error
// says which could not be checked; a row that failed says so, too.
func (o *options) checkAll(ctx context.Context, r *report) error {
	server := bundleServer{url: o.bundleURL, caFile: o.bundleCA}
	if err := server.named(o.bundleID); err != nil {
		return err
	}
	var f *forgery
	if o.forge != "" {
		var err error
		if f, err = readForgery(o.forge, time.Now()); err != nil {
			return err
		}
	}
	var errs []error
	if o.socket != "" {
		roots, err := o.checkSocket(ctx, r, f)
		server.roots = roots
		errs = append(errs, err)
	}
	if o.bundleURL != "" {
		err := checkBundleURL(ctx, r, server)
		if err == nil {
			checkSequence(ctx, r, server)
		}
		errs = append(errs, err)
	}
	if o.server != "" {
		errs = append(errs, r.must("X13", chains, checkServer(ctx, r, o.server, f)))
	}
	if o.serve != "" {
		errs = append(errs, r.must("X13", chains, checkClient(ctx, r, o.serve, f)))
	}
	if o.consumer != "" {
		errs = append(errs, r.must("F-6", consumer, checkConsumer(ctx, r, consumerOptions{driver{o.consumer, o.consumerWait}, o.consumerHost, o.polling})))
	}
	return errors.Join(errs...)
}

// checkSocket checks the Workload API, and gives its own trust domain's roots.
func (o *options) checkSocket(ctx context.Context, r *report, f *forgery) (roots *x509bundle.Bundle, err error) {
	e, own, err := checkEndpoint(ctx, r, o.socket)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.cc.Close()) }()
	bundles, err := e.x509Bundles(ctx)
	if err != nil {
		return nil, err
	}
	if roots, err = x509bundle.ParseRaw(own.TrustDomain(), bundles.GetBundles()[own.TrustDomain().IDString()]); err != nil {
		return nil, err
	}
	if f != nil {
		return roots, r.must("E16", tokens, e.checkValidate(ctx, r, own.TrustDomain(), f))
	}
	return roots, nil
}

// given says whether a target was named that has this part. A Workload API validates
// JWT-SVIDs, so what it makes of forged ones belongs to it.
func (o *options) given(of part) bool {
	switch of {
	case issuer, api, tokens:
		return o.socket != ""
	case chains:
		return o.server != "" || o.serve != ""
	case endpoint:
		return o.bundleURL != ""
	case consumer:
		return o.consumer != ""
	}
	return false
}

// missing says by which flag, or by what else, a requirement would be checked of a part.
func (o *options) missing(id string, of part) string {
	if !o.given(of) {
		return map[part]string{
			issuer: "--socket was not given", api: "--socket was not given", tokens: "--socket and --forge were not given",
			chains: "--server or --serve, with --forge, was not given", endpoint: "--bundle-url was not given", consumer: "--consumer was not given",
		}[of]
	}
	switch {
	case of == tokens && o.forge == "":
		return "--forge was not given"
	case of == consumer && o.polling == 0 && (id == "F-3" || id == "B10"):
		return "--polling was not given"
	case of == endpoint && id == "F-14" && o.bundleID == "":
		return "--bundle-id was not given: it is about endpoints of profile https_spiffe"
	case of == endpoint && id == "W13":
		return "the bundle has no WIT authority"
	case of == endpoint && id == "J11":
		return "the bundle has no JWT authority"
	case of == endpoint && id == "X15":
		return "the bundle has no X.509 authority"
	case of == issuer && id == "ID6":
		return "give this process an entry whose SPIFFE ID has 2048 bytes, too"
	}
	return "nothing that was seen is about it"
}
