// A request on its way through: one stream of the caller's connection and one of an
// upstream's, from the decision to the end of both.

package http2

import (
	"errors"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	codec "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// call is one request. Locks are taken in the order mu, then a connection's, and never
// two of connections.
type call struct {
	eng    *engine
	head   head
	noBody bool
	// tooMany says that hop.Begin has not counted the call.
	tooMany bool
	down    stream // the caller's
	// up is the upstream's; nil until there is one.
	up     atomic.Pointer[stream]
	first  stream // the first of up, which is nearly always the only one
	left   atomic.Int32
	hinted atomic.Bool // an informational answer has come

	in       *policy.Input // of an inbound hop
	decision policy.Decision

	// The caller's reader's alone.
	got int64 // of the body

	in64, out64 atomic.Int64 // bytes of bodies
	movedAt     atomic.Int64 // the engine's clock
	status      atomic.Int32 // of the answer
	answering   atomic.Bool  // the upstream's has begun
	grpcStatus  atomic.Pointer[string]
	tries       hop.Tries

	mu sync.Mutex
	// Guarded by mu.
	waiting  stream // what has come of the body while up is nil: queue, ending, trailers
	over     bool   // there will be no (further) upstream
	retried  bool   // first was used
	upstream *hop.Upstream
	unfollow func()
	entry    hop.Entry
}

// newCall is a request of which the head has come. c.mu is held.
func newCall(c *conn, id uint32, end bool) *call {
	k := &call{eng: c.eng, noBody: end, tooMany: !c.eng.hop.Begin()}
	k.down = stream{
		call: k, conn: c, id: id, recvEnd: end,
		sendWindow: c.peerWindow, recvWindow: firstWindow, window: firstWindow,
	}
	k.left.Store(2)
	k.movedAt.Store(c.eng.clock.Load())
	k.entry = hop.Entry{Begun: time.Now(), Source: c.caller.ID, Remote: c.caller.Remote}
	return k
}

func (k *call) other(s *stream) *stream {
	if s == &k.down {
		return k.up.Load()
	}
	return &k.down
}

func (k *call) isGRPC() bool    { return k.eng.hop.Protocol == policy.GRPC }
func (k *call) isInbound() bool { return k.eng.hop.Direction == hop.Inbound }

// begin reads the request's head and has it decided and forwarded. It says whether it
// was a request at all.
func (k *call) begin(list *fieldList, end bool, b *batch) (ok bool) {
	var err error
	if k.head, err = readHead(list.fields, k.isGRPC()); list.over {
		err = errors.New("the header fields are longer than allowed")
	}
	if err == nil && end && k.head.length > 0 {
		err = malformed("content-length is %d, and there is no body", k.head.length)
	}
	k.entry.Method, k.entry.Path, k.entry.Host = k.head.method, k.head.path, k.head.authority
	k.entry.Trace = k.eng.hop.Trace(k.eng.life, &k.entry, k.head.values)
	if k.entry.Trace != nil {
		k.head.strip(k.entry.Trace.Replaces)
	}
	if k.isInbound() {
		k.head.strip(k.eng.hop.Strip)
		k.in = k.head.input(k.eng.hop.Protocol)
		k.in.SourceAddress, k.in.DestinationAddress = k.down.conn.caller.Remote, k.down.conn.caller.Local
	}
	switch {
	case err != nil:
		return k.refuse(err, b)
	case k.tooMany: // before anything that costs more
		k.fail(hop.ListenerFull, hop.ErrListenerFull, b)
	case !k.isInbound():
		k.connect(b)
	case k.eng.hop.Identity.DecidesHere():
		if k.decide(b) {
			k.connect(b)
		}
	default: // the agent decides, and others must not wait for that
		k.background(func() {
			if k.decide(nil) {
				k.connect(nil)
			}
		})
	}
	return true
}

// background has f done by a goroutine of its own.
func (k *call) background(f func()) { k.eng.goroutines.Go(f) }

// refuse answers a request that no policy can be asked about, or resets what is none.
func (k *call) refuse(err error, b *batch) (ok bool) {
	d := policy.Deny(policy.BadRequest)
	if k.isInbound() {
		d = k.eng.hop.Identity.Refuse(k.entry.Trace.Context(k.eng.life), k.down.conn.caller.State, k.in, err)
	}
	k.note(func(e *hop.Entry) {
		e.Reason, e.DecisionID, e.Denied, e.Err = d.Reason, d.DecisionID, true, err.Error()
	})
	var bad *malformedError
	if ok = !errors.As(err, &bad); ok {
		k.deny(d, b)
	} else {
		k.resetDown(codec.ErrCodeProtocol, b)
	}
	k.endUp(codec.ErrCodeCancel, b)
	return ok
}

// decide asks the policy, and answers for it where it says no.
func (k *call) decide(b *batch) (allowed bool) {
	id := k.eng.hop.Identity
	_, k.decision = id.Ask(k.entry.Trace.Context(k.eng.life), k.down.conn.caller.State, k.in)
	d := k.decision
	k.note(func(e *hop.Entry) { e.Reason, e.DecisionID, e.Denied = d.Reason, d.DecisionID, !d.Allow })
	if !d.Allow {
		k.deny(d, b)
		k.endUp(codec.ErrCodeCancel, b)
		return false
	}
	k.head.asDecided(d.Response, &k.down.conn.caller)
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.over {
		k.unfollow = id.Follow(k.in, d, k.revoke)
	}
	return true
}

// revoke ends a call that the policy has allowed before.
func (k *call) revoke(d policy.Decision) {
	k.note(func(e *hop.Entry) { e.Reason, e.DecisionID, e.Denied = d.Reason, d.DecisionID, true })
	k.deny(d, nil)
	k.endUp(codec.ErrCodeCancel, nil)
}

// note changes the record of the call.
func (k *call) note(f func(*hop.Entry)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(&k.entry)
}

// connect forwards the request, at once where there is a connection that takes it.
func (k *call) connect(b *batch) {
	u, err := k.eng.hop.Upstreams.Pick()
	if err != nil {
		k.fail(hop.Unconnected(err), err, b)
		return
	}
	if c := k.eng.pools[u].pick(); c != nil && k.open(u, c, b) {
		return
	}
	k.background(func() { k.connectTo(u) })
}

// connectTo forwards the request over a connection of u, or of another upstream where
// u cannot be connected to.
func (k *call) connectTo(u *hop.Upstream) {
	var tried []*hop.Upstream
	for filled := 0; ; {
		c, err := k.eng.pools[u].get(k.eng.life)
		if err == nil {
			if k.open(u, c, nil) {
				return
			}
			if filled++; filled < maxConns { // by others, meanwhile
				continue
			}
			err = errFull
		}
		full := errors.Is(err, hop.ErrUpstreamFull)
		u.Done(!full)
		tried = append(tried, u)
		if len(tried) == len(k.eng.hop.Upstreams.All()) || !full && !k.eng.hop.Again(&k.tries) {
			k.fail(hop.Unconnected(err), err, nil)
			return
		}
		if u, err = k.eng.hop.Upstreams.Pick(tried...); err != nil {
			k.fail(hop.Unconnected(err), err, nil)
			return
		}
	}
}

// open makes the upstream's stream on c, unless c takes no more. Where nobody waits for
// the answer any more it does nothing.
func (k *call) open(u *hop.Upstream, c *conn, b *batch) (done bool) {
	k.mu.Lock()
	if k.over {
		k.mu.Unlock()
		u.Done(false)
		return true
	}
	s := &k.first
	if k.retried {
		s = new(stream)
	}
	c.mu.Lock()
	if !c.takes() {
		c.mu.Unlock()
		k.mu.Unlock()
		return false
	}
	if c.lastID == 0 {
		c.lastID = 1
	} else {
		c.lastID += 2
	}
	w := &k.waiting
	*s = stream{
		call: k, conn: c, id: c.lastID, sendWindow: c.peerWindow, recvWindow: firstWindow, window: firstWindow,
		queue: w.queue, ending: w.ending, trailers: w.trailers,
	}
	k.waiting = stream{}
	c.streams[s.id] = s
	c.load.Store(int32(len(c.streams)))
	if c.lastID >= maxWindow-2 {
		c.room.Store(0) // there are no more numbers
	}
	end := s.ending == withData && s.queue.n == 0 || s.ending == notYet && k.noBody
	k.putHead(c, s, end)
	switch {
	case end:
		s.ending = withData
		c.ended(s)
	case s.queue.n > 0:
		c.block(s)
		c.pump()
	case s.ending == withTrailers:
		c.putTrailers(s)
	}
	k.upstream = u
	k.entry.Upstream = u.Address
	k.up.Store(s)
	c.written(b)
	k.mu.Unlock()
	c.unlock(b)
	return true
}

// putHead puts the request's head. c.mu is held.
func (k *call) putHead(c *conn, s *stream, end bool) {
	scheme := "http" // what this hop is: a server that looks at it wants what it speaks
	if c.state != nil {
		scheme = "https"
	}
	c.field(hpack.HeaderField{Name: ":method", Value: k.head.method})
	c.field(hpack.HeaderField{Name: ":scheme", Value: scheme})
	c.field(hpack.HeaderField{Name: ":authority", Value: k.head.authority})
	c.field(hpack.HeaderField{Name: ":path", Value: k.head.target})
	for _, f := range k.head.fields {
		c.field(f)
	}
	for _, f := range k.entry.Trace.Fields() { // others than those of the next request
		c.field(hpack.HeaderField{Name: f.Name, Value: f.Value, Sensitive: true})
	}
	c.endFields(s.id, end)
}

// counts adds n bytes of the body that came on s, and says whether that is what the
// request has announced.
func (k *call) counts(s *stream, n int, end bool) bool {
	k.movedAt.Store(k.eng.clock.Load())
	if s != &k.down {
		k.out64.Add(int64(n))
		return true
	}
	k.in64.Add(int64(n))
	k.got += int64(n)
	return k.head.length < 0 || k.got == k.head.length || k.got < k.head.length && !end
}

// send passes a piece of a body from s to the other side, and says how much that has
// taken.
func (k *call) send(s *stream, body []byte, end bool, b *batch) (taken int) {
	if s != &k.down {
		taken, _ = k.down.send(body, end, b)
		return taken
	}
	for {
		if up := k.up.Load(); up != nil {
			if taken, gone := up.send(body, end, b); !gone || k.isLast(up) {
				return taken
			}
			continue
		}
		k.mu.Lock()
		switch {
		case k.up.Load() != nil:
			k.mu.Unlock()
			continue
		case k.over:
			k.mu.Unlock()
			return len(body)
		}
		k.waiting.queue.push(body)
		if end {
			k.waiting.ending = withData
		}
		k.mu.Unlock()
		return 0
	}
}

// isLast says whether nothing will come in the place of up.
func (k *call) isLast(up *stream) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.up.Load() == up
}

// sendTrailers passes the request's trailers on.
func (k *call) sendTrailers(fields []hpack.HeaderField, b *batch) {
	for {
		if up := k.up.Load(); up != nil {
			if gone := up.sendTrailers(fields, b); !gone || k.isLast(up) {
				return
			}
			continue
		}
		k.mu.Lock()
		if k.up.Load() == nil {
			k.waiting.ending, k.waiting.trailers = withTrailers, fields
			k.mu.Unlock()
			return
		}
		k.mu.Unlock()
	}
}

// endUp ends the upstream's side, or sees to it that there will be none.
func (k *call) endUp(code codec.ErrCode, b *batch) {
	k.mu.Lock()
	up := k.up.Load()
	was := k.over
	k.over = true
	dropped := k.waiting.queue.drop()
	k.mu.Unlock()
	if up != nil {
		up.end(code, b)
		return
	}
	k.down.credit(dropped, b)
	if !was {
		k.streamGone()
	}
}

// resetDown ends the caller's side.
func (k *call) resetDown(code codec.ErrCode, b *batch) { k.down.end(code, b) }

// otherEnded is after s has ended before its time: so does the other side.
func (k *call) otherEnded(s *stream, b *batch) {
	if s == &k.down {
		k.note(func(e *hop.Entry) {
			if e.Err == "" && !e.Denied {
				e.Err = "the caller has cancelled the request"
			}
		})
		k.endUp(codec.ErrCodeCancel, b)
		return
	}
	k.upstreamLost(s, "the upstream broke the rules of HTTP/2", b)
}

// connEnded is after the connection of s has.
func (k *call) connEnded(s *stream, b *batch) {
	if s == &k.down {
		k.otherEnded(s, b)
		return
	}
	k.upstreamLost(s, "the upstream's connection has ended", b)
}

// upstreamLost is after the upstream's side has gone: that is a failure, unless all of
// its answer had come.
func (k *call) upstreamLost(s *stream, why string, b *batch) {
	s.conn.mu.Lock()
	complete := s.recvEnd
	s.conn.mu.Unlock()
	if complete {
		k.down.stopAfterEnd(b)
		return
	}
	k.failed(hop.Broken, errors.New(why), b)
}

// upstreamReset is after RST_STREAM, or a GOAWAY that says as much.
func (k *call) upstreamReset(s *stream, code codec.ErrCode, b *batch) {
	if code == codec.ErrCodeRefusedStream && k.tryAgain(s, false) {
		return
	}
	c := s.conn
	c.mu.Lock()
	complete := s.recvEnd
	c.forget(s)
	c.unlock(b)
	if complete { // it wants no more of the body
		k.down.stopAfterEnd(b)
		return
	}
	switch code {
	case codec.ErrCodeRefusedStream, codec.ErrCodeCancel, codec.ErrCodeEnhanceYourCalm, codec.ErrCodeNo, codec.ErrCodeInternal, codec.ErrCodeHTTP11Required:
	default: // about what we did, and none of the caller's business
		code = codec.ErrCodeInternal
	}
	k.note(func(e *hop.Entry) {
		e.Failed, e.Failure, e.Err = true, hop.Broken, "the upstream has reset the stream: "+code.String()
	})
	k.resetDown(code, b)
}

// connLost is while the connection of s ends: what may be asked twice is, if nothing of
// it is missing here.
func (k *call) connLost(s *stream) {
	if k.noBody && !k.hinted.Load() && k.eng.hop.Retry.Repeats(k.head.method) {
		k.tryAgain(s, true)
	}
}

// tryAgain takes back what was forwarded on s, and forwards it once more, where nothing
// of it is missing here and the budget allows. failed says that the upstream has failed.
func (k *call) tryAgain(s *stream, failed bool) bool {
	k.mu.Lock()
	c := s.conn
	c.mu.Lock()
	if k.over || s.gone || s.sent > 0 || k.answering.Load() || !k.eng.hop.Again(&k.tries) {
		c.mu.Unlock()
		k.mu.Unlock()
		return false
	}
	k.retried = true
	k.waiting = stream{queue: s.queue, ending: s.ending, trailers: s.trailers}
	s.queue, s.trailers = queue{}, nil
	u := k.upstream
	k.upstream = nil
	k.left.Add(1)
	k.up.Store(nil)
	c.forget(s)
	k.mu.Unlock()
	c.unlock(nil)
	u.Done(failed)
	k.background(func() {
		if u, err := k.eng.hop.Upstreams.Pick(); err != nil {
			k.fail(hop.Unconnected(err), err, nil)
		} else {
			k.connectTo(u)
		}
	})
	return true
}

// streamGone is after a side has ended, or will never begin.
func (k *call) streamGone() {
	if k.left.Add(-1) == 0 {
		k.finish()
	}
}

var entries = sync.Pool{New: func() any { return new(hop.Entry) }}

// finish is after both sides have.
func (k *call) finish() {
	e := entries.Get().(*hop.Entry)
	defer entries.Put(e)
	k.mu.Lock()
	*e = k.entry
	u, unfollow := k.upstream, k.unfollow
	k.mu.Unlock()
	if unfollow != nil {
		unfollow()
	}
	if u != nil {
		u.Done(e.Failed && !k.answering.Load())
	}
	if !k.tooMany {
		k.eng.hop.End()
	}
	k.eng.hop.Settle(&k.tries)
	e.Retries = k.tries.More()
	e.Took = time.Since(e.Begun)
	e.BytesIn, e.BytesOut, e.Status = k.in64.Load(), k.out64.Load(), int(k.status.Load())
	if code := k.grpcStatus.Load(); code != nil {
		e.GRPCStatus = *code
	}
	k.eng.hop.Record(e)
}

// passAnswer passes an answer's head on, with what the policy adds.
func (k *call) passAnswer(status int, fields []hpack.HeaderField, end bool, b *batch) {
	s := &k.down
	c := s.conn
	c.mu.Lock()
	defer c.unlock(b)
	if s.gone || s.stopped {
		return
	}
	c.field(hpack.HeaderField{Name: ":status", Value: strconv.Itoa(status)})
	for _, f := range fields {
		c.field(f)
	}
	if status < 200 {
		k.hinted.Store(true)
	} else {
		k.eng.hop.Settle(&k.tries)
		k.addPolicys(c, fields)
		s.begun = true
		k.status.Store(int32(status))
		k.noteGRPC(fields)
	}
	c.endFields(s.id, end)
	if end {
		c.ended(s)
	}
	c.written(b)
}

// addPolicys puts the policy's fields that the answer does not have. c.mu is held.
func (k *call) addPolicys(c *conn, have []hpack.HeaderField) {
	if k.decision.Response == nil {
		return
	}
	for _, f := range k.decision.Response.ResponseHeaders {
		if !hasField(have, f.Name) {
			c.field(hpack.HeaderField{Name: f.Name, Value: f.Value})
		}
	}
}

// passTrailers passes an answer's trailers on.
func (k *call) passTrailers(list []hpack.HeaderField, b *batch) {
	k.noteGRPC(list)
	k.down.sendTrailers(slices.Clone(list), b)
}

// noteGRPC looks for the status of a gRPC call.
func (k *call) noteGRPC(fields []hpack.HeaderField) {
	for i := range fields {
		if fields[i].Name == "grpc-status" {
			code := fields[i].Value // not the list's, which is used again
			k.grpcStatus.Store(&code)
		}
	}
}
