"""Chinese held-out phrasings of the embedded command set; `commands.py` explains the format.

As in English, they share few words with the training phrasings on purpose.
"""

from __future__ import annotations

INTENTS = """
@alarm_set
validation !{time}把我叫醒 | !闹钟设在{time}
test !{time}的时候叫醒我 | !给我上个{time}的闹钟 | {time}我得起来，设个闹铃
  | 别让我睡过头，{time}就得起
@alarm_cancel
validation !撤掉{time}的闹钟 | !清空闹钟
test !把{time}那个闹铃取消掉 | 明天想睡懒觉，闹钟不要响 | {time}不用叫我了 | !删了所有的闹铃
@timer_start
validation !来个{duration}的倒计时 | !用计时器记{duration}
test !开个{duration}的计时 | 面要煮{duration}，看着时间 | !从现在起倒数{duration}
  | {duration}到了就响一下
@timer_check
validation 计时器跑完了吗 | 倒计时剩几秒
test 还要多久计时器才响 | 时间到了没有，计时器还走着吗 | !告诉我倒计时剩多少 | 计时还差多长时间结束
@call_start
validation !给{person}去个电话 | !接通{person}
test !拨个电话给{person} | 我想听听{person}的声音，打过去 | !给{person}拨号 | 找{person}接电话
@call_decline
validation !断开通话 | 这个来电不接
test !把电话挂掉 | 这个电话我不想接 | !把来电按掉 | 不管谁打来都别接
@message_send
validation !给{person}留言{message} | !回{person}一句{message}
test !转告{person}{message} | !给{person}发个消息，就说{message} | !通知{person}{message}
  | {person}还不知道，说一声{message}
@message_read
validation !查看新短信 | {person}的信息写了什么
test {person}回我了没有 | !把{person}发的消息念给我听 | 刚才谁发来的信息 | !看一下有谁给我留言
@navigate
validation !规划到{place}的路线 | 到{place}最近的路
test !领我到{place} | 到{place}要怎么走 | 我迷路了，怎么回{place} | !查一下从这里去{place}的走法
@traffic_check
validation 高速堵吗 | 去{place}会不会堵在路上
test {place}那边车多不多 | 现在去{place}会遇上堵车吗 | 早高峰路上挤不挤 | 到{place}的路通畅吗
@taxi_book
validation !约个出租车到{place} | !叫车来接我
test !喊辆出租车送我到{place} | 我没有车，找人送我去{place} | !叫个司机来接我去{place}
  | 打个滴滴到{place}
@music_play
validation !来点{song} | 我要听{song}
test !放{song}来听听 | 心情不错，来段{song} | !用音箱放{song} | 好久没听{song}了
@music_pause
validation !停掉音乐 | !歌先停一停
test 音乐停一下 | 歌不用再放了 | !把正在放的歌停住 | 吵死了，别再唱了
@music_next
validation !切到下一首 | !跳到后面一首
test !换个别的歌 | 这歌听腻了，换下一个 | !把这首跳过去 | 后面那首是什么，直接放
@volume_up
validation !提高音量 | 声音再大些
test !把声音开大 | 听不清楚，响一点 | !音量往上加 | 喇叭声太弱了
@volume_down
validation !降低音量 | 声音再小些
test !把声音关小 | 孩子睡了，轻声点 | !音量往下减 | 喇叭太响，震耳朵
@dnd_on
validation !启用勿扰 | !把通知都静音
test 我在开会，不要有任何提醒 | !{duration}里别让人打扰我 | !调成免打扰
  | 想安静{duration}，别弹消息
@dnd_off
validation !停用勿扰 | !把通知恢复
test 会开完了，消息提醒可以打开了 | !解除免打扰 | 不用再静音了 | 现在可以收通知了
@weather
validation {city}有雾霾吗 | {day}是晴天还是阴天
test {city}{day}冷不冷 | 去{city}要不要穿外套 | {day}出太阳吗 | {city}气温多少
@wifi_on
validation !连无线网 | !把无线打开
test !连一下wifi | 到家了，切换到无线网络 | 别用流量了，连无线 | !让手机上wifi
@wifi_off
validation !断开无线网 | !把无线关掉
test !断一下wifi | 出门了，不连无线网络 | 只用流量，无线不要 | !让手机别连wifi
@bluetooth_on
validation !连蓝牙 | !和耳机配对
test !把蓝牙弄开 | !让手机连上车载蓝牙 | 耳机要用，连一下 | !跟音箱配上对
@bluetooth_off
validation !断蓝牙 | !跟耳机断开
test !把蓝牙弄掉 | !让手机断开车载蓝牙 | 耳机不用了，断掉 | !跟音箱取消配对
@brightness_up
validation !加大亮度 | 屏幕再亮些
test !把亮度往上调 | 光线太强，字都看不清 | 屏幕黑乎乎的，调一下 | !让显示屏更亮
@brightness_down
validation !减少亮度 | 屏幕再暗些
test !把亮度往下调 | 眼睛被屏幕晃得难受 | 晚上看屏幕太晃眼，调一下 | !让显示屏没那么亮
@flashlight_on
validation !把手电打开 | !亮一下手电筒
test !用手电照一下 | 路上太黑，看不见 | 停电了，拿手机照个亮 | !手电筒亮起来
@flashlight_off
validation !把手电关上 | !灭了手电筒
test !手电筒不要照了 | 找到钥匙了，手电可以关了 | 来电了，不用手机照着了 | !把手电筒灭掉
@photo_take
validation !来张自拍 | !给{person}照一张
test !给我和{person}拍个合影 | 大家笑一个，拍了 | !按下快门 | 这风景真美，照下来
@photos_show
validation !调出{person}的照片 | !看相册
test !翻翻去{city}玩的照片 | 想看看{person}以前的样子，找照片 | !把{city}的相册打开
  | 上次和{person}拍的在哪
@video_record
validation !录个短视频 | !给{person}拍段视频
test !把{person}唱歌录下来 | !拍个小视频 | !打开录像功能 | {person}要跳舞了，摄像
@screenshot
validation !截一张屏 | !来个截图
test !给屏幕截一下 | !把现在的界面存成图 | 这个聊天截下来 | !抓取当前屏幕
@calendar_add
validation !建个{day}的日程，{event} | !日历上写{day}{event}
test !把{day}的{event}放进日程 | {day}要{event}，加到行程里 | !给{day}留出{event}的时间
  | !行程新增{event}，{day}
@calendar_query
validation {day}忙不忙 | !列出{day}的日程
test {day}的日程满了吗 | {event}是哪天来着 | {day}我要见谁 | !告诉我{day}都安排了什么
@reminder_add
validation !记得提醒我{task} | !{time}催我{task}
test !到了{time}提醒一声{task} | 我老是忘{task}，提个醒 | !{time}的时候告诉我该{task}了
  | 待会儿别忘了让我{task}
@note_add
validation !备忘一下，{note} | !便签写上{note}
test !把这个记下，{note} | !备忘录记一条，{note} | 存个便签，{note} | 怕忘了，写在笔记里，{note}
@translate
validation !将{phrase}译为{language} | 拿{language}怎么说{phrase}
test {phrase}翻成{language} | {phrase}这句话{language}怎么讲 | !把{phrase}换成{language}
  | 想跟服务员用{language}讲{phrase}
@calculate
validation !算算{expression} | {expression}得多少
test !算出{expression} | {expression}一共多少 | {expression}答案是几 | 做道算术，{expression}
@lights_on
validation !{room}灯点亮 | !给{room}开灯
test !把{room}的灯弄亮 | {room}里黑得看不见 | 我要进{room}，灯亮着 | !{room}的灯开一下
@lights_off
validation !{room}灯熄了 | !给{room}关灯
test !把{room}的灯弄灭 | {room}没人，灯别开着 | 我要在{room}睡觉，别亮灯 | !{room}的灯关一下
@thermostat_set
validation !空调温度{temperature} | !{room}要{temperature}
test !让{room}升到{temperature} | 好冷，{room}开到{temperature} | 空调打到{temperature}
  | 室内{temperature}最舒服，调一下
@app_open
validation !点开{app} | !调出{app}
test !把{app}打开看看 | 想刷一会儿{app} | !进{app}里面 | 给我开一下{app}
@app_close
validation !停掉{app} | !离开{app}
test !把{app}退了 | {app}卡住了，关了它 | 今天{app}看够了 | 别让{app}在后台运行
@app_install
validation !装上{app} | !到商店下{app}
test !给手机装个{app} | 我还没有{app}，下载一个 | 手机上缺{app}，装一下 | 朋友都在用{app}，我也要装
@app_uninstall
validation !去除{app} | !把{app}清出手机
test !把{app}从手机上移走 | {app}太占空间，删掉 | 以后用不到{app}，卸掉吧 | {app}不要留在手机里
@web_search
validation !检索{topic} | !找找{topic}的网页
test !上网搜搜{topic} | 网上怎么说{topic} | !查查{topic}的相关资料 | 想研究{topic}，找点网页
@email_send
validation !邮件告诉{person}{subject}的事 | !给{person}写信谈{subject}
test !把{subject}用邮件发给{person} | !发个电邮给{person}讲讲{subject}
  | {subject}的事写邮件跟{person}说 | !往{person}的邮箱发{subject}
@pay
validation !打{amount}给{person} | !给{person}汇{amount}
test !把{amount}转到{person}账上 | {person}借过我{amount}，还掉 | !给{person}打款{amount}
  | 该给{person}{amount}了，转过去
@food_order
validation !来份{dish}外卖 | 想点{dish}
test !叫份{dish}送过来 | 肚子饿，想来{dish} | 中午吃{dish}，点外卖 | 馋{dish}了，下个单
@battery_check
validation 手机电量还够吗 | 电池还剩几成
test 手机还能撑多久，电够不够 | 现在电池百分之几 | 快没电了吧，看一下 | 用不用找充电器
@contact_add
validation !通讯录加{person} | !存{person}的号
test !把{person}存进电话簿 | 这是{person}的号码，存起来 | 刚认识{person}，加到联系人
  | !添上{person}的手机号
@podcast_play
validation !听{podcast}最新一集 | !接着放{podcast}
test !放一期{podcast}节目 | {podcast}这周出新的了吗，播一下 | !从上次的地方接着听{podcast}
  | 想听播客，{podcast}那个
@news
validation !放{topic}的新闻 | 关于{topic}的头条
test 今天出了什么大事 | 媒体怎么报道{topic} | !讲讲时事 | {topic}最近有什么报道
@stock_price
validation {company}的股票现在多少 | {company}收盘价
test {company}的股票涨还是跌 | 我买的{company}亏了没有 | {company}市值看一下 | {company}每股什么价
@sports_score
validation {team}输了吗 | {team}昨天的结果
test {team}打了几比几 | {team}这场比赛赢没赢 | {team}是不是输球了 | 刚才{team}谁进的球
@phone_find
validation !寻找一下手机 | 手机不见了
test 手机放哪儿了，响一声 | 到处找不到我的手机 | 手机掉沙发里了吧，让它响 | 忘了手机搁在什么地方
@airplane_on
validation !进入飞行模式 | 上飞机了，开飞行模式
test !设成飞行模式 | 飞机快起飞了，断开所有信号 | 空姐让关信号，切一下模式 | 坐飞机用的那个模式打开
@hotel_book
validation !{city}订间房 | !预订{day}在{city}的酒店
test !在{city}订个住的地方 | {day}到{city}，找间宾馆 | 去{city}过夜住哪，订一间
  | !安排{city}{day}的住宿
@oos
validation 珠穆朗玛峰有多高 | 你有感情吗 | 熨衬衫 | 红楼梦是谁写的 | 晚安亲爱的 | 关掉太阳
  | {city}是什么时候建的 | {dish}健康吗 | {topic}为什么流行 | {person}怕什么
  | {company}是哪年成立的 | 给我找个对象
test 万有引力是谁发现的 | 你开心吗 | 打扫浴室地板 | 有外星人吗 | 割草 | 和{person}捉迷藏
  | {dish}用什么材料做 | 流过{city}的河叫什么 | {city}多大年纪了 | 写一段{topic}的顺口溜
  | 谁管理{company} | {person}今年几岁 | 让我跟{person}约会 | 有一百万你怎么花 | 猫比狗聪明吗
  | 光走得多快 | 海有多深 | 抱抱{person} | 鱼睡觉吗 | 我失恋了 | 让时间倒流 | 大家为什么爱吃{dish}
  | 你最喜欢什么颜色 | 教我变魔术 | {topic}是谁的主意 | {song}是什么意思
"""
